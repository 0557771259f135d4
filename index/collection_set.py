"""A folder of collections, owned by one process."""

import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from index.builder import Builder
from index.collection import Collection
from index.database import damage
from index.errors import (
    CollectionExists,
    CollectionNotFound,
    InvalidVector,
    ModelMismatch,
    StoreDamaged,
    StoreFailed,
)
from index.folder import OwnedFolder
from index.kinds import IndexSettings, Metric
from index.maintenance import BuildPolicy
from index.records import check_name, is_name
from index.snapshots import Snapshot, Snapshots
from index.store import Store

_logger = logging.getLogger(__name__)


class CollectionSet:
    """A folder of collections, owned by one process. A context manager.

    Opening it opens every collection there and clears what an earlier crash left half done. A
    damaged collection, or one that the operating system does not let it read, does not keep the
    others from opening: it is logged, stands in `damaged` and among `names()`, and is reported by
    whoever asks for it; `restore` brings it back from a snapshot, `delete` removes it.

    Args:
        policy: when background work on indexes is worth doing.

    Raises:
        StoreInUse: another process, or another `CollectionSet`, has the folder.
        StoreFailed: the operating system refused, for instance because the disk is full.
    """

    def __init__(self, root: Path, *, policy: BuildPolicy | None = None) -> None:
        self.damaged: dict[str, StoreDamaged | StoreFailed] = {}
        self._open: dict[str, Collection] = {}
        # For making, deleting and closing. Looking up is one read of a dictionary.
        self._lock = threading.RLock()
        self._policy = policy or BuildPolicy()
        self._folder = OwnedFolder(root)
        self._builder = Builder()
        try:
            self._snapshots = Snapshots(root)
            for name in self._folder.subfolders():
                if is_name(name):
                    self._open_one(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Every collection's name, sorted; damaged ones too."""
        return sorted([*self._open, *self.damaged])

    def get(self, name: str) -> Collection:
        """An open collection; raises `CollectionNotFound`, or what kept it from opening."""
        collection = self._open.get(name)
        if collection is not None:
            return collection
        if isinstance(self.damaged.get(name), StoreFailed):
            with self._lock:  # the operating system may let it by now
                if isinstance(self.damaged.pop(name, None), StoreFailed):
                    self._open_one(name)
                if name in self._open:
                    return self._open[name]
        if name in self.damaged:
            error = self.damaged[name]
            raise type(error)(*error.args) from error
        raise CollectionNotFound(f"there is no collection {name!r}; there are {self.names()}")

    def create(
        self,
        name: str,
        *,
        spaces: Mapping[str, int],
        model: str,
        metric: Metric = "cosine",
        settings: IndexSettings | None = None,
    ) -> Collection:
        """Make an empty collection; on disk when this returns.

        Args:
            name: 1 to 63 characters out of a-z, 0-9, '_' and '-', the first a letter or digit.
            spaces: name -> dimension.
            model: the fingerprint of the model that the vectors will come from.
            metric: "cosine", "ip" (inner product) or "l2" (Euclidean distance).
            settings: the kind of index; `Collection.configure` changes it.

        Raises:
            CollectionExists, StoreFailed.
            InvalidName, InvalidVector, InvalidSettings: what was given cannot be.
        """
        check_name(name)
        with self._lock:
            if self._folder.has(name):
                raise CollectionExists(f"there is a collection {name!r} already")
            with self._folder.making(name) as folder:
                Store.create(folder, spaces=spaces, model=model, metric=metric, settings=settings)
            self._open_one(name)
            return self.get(name)

    def get_or_create(
        self, name: str, *, spaces: Mapping[str, int], model: str, metric: Metric = "cosine"
    ) -> Collection:
        """`get`, or `create` where there is none.

        Raises:
            ModelMismatch, InvalidVector: it exists with another model, or with other spaces or
                another metric.
        """
        with self._lock:
            if name not in self.names():
                return self.create(name, spaces=spaces, model=model, metric=metric)
            collection = self.get(name)
        if collection.model != model:
            raise ModelMismatch(
                f"collection {name!r} holds vectors of model {collection.model!r}, which cannot be "
                f"compared with those of {model!r}"
            )
        if (collection.spaces, collection.metric) != (dict(spaces), metric):
            raise InvalidVector(
                f"collection {name!r}: expected spaces {dict(spaces)} and metric {metric!r}, "
                f"it has {collection.spaces} and {collection.metric!r}"
            )
        return collection

    def delete(self, name: str) -> None:
        """Remove a collection with all in it; raises `CollectionNotFound`, `StoreFailed`."""
        with self._lock:
            if name not in self.damaged:
                self.get(name).close()
            try:
                self._folder.remove(name)
            except StoreFailed:
                if name in self._open:
                    self._open_one(name)  # it is still there, so it must not stay closed
                raise
            self._open.pop(name, None)
            self.damaged.pop(name, None)

    def snapshot(self, name: str) -> Snapshot:
        """Copy a collection's records as of now, while writes go on; on disk on return.

        Raises:
            CollectionNotFound, StoreDamaged, StoreFailed.
        """
        collection = self.get(name)
        described: dict[str, Any] = {
            "model": collection.model,
            "spaces": collection.spaces,
            "metric": collection.metric,
        }

        def copy(path: Path) -> None:
            described["count"] = collection.back_up(path)

        return self._snapshots.create(name, copy=copy, described=described)

    def snapshots(self, name: str) -> list[Snapshot]:
        """A collection's snapshots, oldest first. It may have been deleted since."""
        return self._snapshots.list(name)

    def snapshot_path(self, name: str, snapshot: str) -> Path:
        """A snapshot's file, to be read; raises `SnapshotNotFound`."""
        return self._snapshots.path(name, snapshot)

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """Remove a snapshot for good; raises `SnapshotNotFound`."""
        self._snapshots.delete(name, snapshot)

    def restore(self, name: str, snapshot: str) -> Collection:
        """Put a snapshot in the place of a collection, whatever state that is in, or of none.

        All or nothing: after an error or a crash the collection is what it was. What it held beside
        the snapshot is lost; its indexes are built anew.

        Raises:
            SnapshotNotFound, SnapshotDamaged, StoreFailed: nothing was changed.
        """
        check_name(name)
        with self._lock:
            try:
                with self._folder.replacing(name) as folder:
                    self._snapshots.restore_into(name, snapshot, folder)
                    if name in self._open:
                        self._open[name].close()
            finally:
                if name not in self._open or self._open[name].is_closed:
                    self._open.pop(name, None)
                    self.damaged.pop(name, None)
                    if self._folder.has(name):
                        self._open_one(name)
            return self.get(name)

    def close(self) -> None:
        """Close every collection and let others have the folder. Closing twice is allowed."""
        with self._lock:
            try:
                with ExitStack() as closing:  # each is closed, whatever another raises
                    for collection in self._open.values():
                        closing.callback(collection.close)
            finally:
                self._open.clear()
                self.damaged.clear()
                self._builder.close()
                self._folder.release()

    def _open_one(self, name: str) -> None:
        try:
            self._open[name] = Collection(
                self._folder.root / name, name=name, builder=self._builder, policy=self._policy
            )
        except (StoreDamaged, StoreFailed) as error:
            _logger.error("%s", error)
            self.damaged[name] = error
        except (TypeError, ValueError, OverflowError) as error:
            # SQLite gives NULL, or anything, for what stood on a page that was overwritten.
            _logger.exception("collection %r", name)
            self.damaged[name] = damage(f"collection {name!r}", f"something is garbled: {error}")
