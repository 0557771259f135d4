"""Copies of collections to go back to; they outlive the collection, damaged or deleted.

In the folder of the collections:

    .snapshots/<collection>/<name>.sqlite    an ordinary SQLite database
    .snapshots/<collection>/<name>.json      the manifest: size, checksum, what was copied

The manifest is written last: a file without one is unfinished and is cleared at the next start. To
look into a snapshot without changing it:

    sqlite3 'file:NAME.sqlite?immutable=1' 'SELECT id, metadata FROM records LIMIT 10'
"""

import hashlib
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from index.durable import (
    ManifestDamaged,
    fsync,
    pieces_of,
    read_manifest,
    refusals_named,
    sha256_of,
    write_manifest,
)
from index.errors import SnapshotDamaged, SnapshotNotFound
from index.records import check_name, is_name
from index.store import FILE_NAME

_FOLDER = ".snapshots"
_FORMAT = 1
_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z(-[1-9][0-9]{0,8})?")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A collection as it was.

    Attributes:
        name: when it was made, in UTC: `20261122T203100Z`; the second of one second ends in `-2`.
        created_at: Unix seconds; every write acknowledged before is in it.
        bytes: the size of its file.
        count: how many records it holds.
        model: the fingerprint of the model that made the vectors.
    """

    name: str
    collection: str
    created_at: float
    bytes: int
    count: int
    model: str


_Snapshots: TypeAlias = list[Snapshot]
_Names: TypeAlias = list[str]


class Snapshots:
    """The snapshots of all collections below `root`, which the caller's process owns.

    Begins by clearing the copies that a crash left unfinished. Safe to use from many threads; one
    snapshot is made at a time. Any method but `list` and `collections` may raise `StoreFailed`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / _FOLDER
        self._making = threading.Lock()
        for collection in self._folders():
            self._clear_unfinished(collection)

    def create(
        self,
        collection: str,
        *,
        copy: Callable[[Path], None],
        described: Mapping[str, Any],
    ) -> Snapshot:
        """Make a snapshot; on disk when this returns, and gone when this raises.

        Args:
            collection: its name.
            copy: writes the collection's database to the path it is given, a file that is not there
                yet, as `Database.backup` does.
            described: JSON values, kept in the manifest: `count`, `model` and what else may help.
                Read after `copy` has returned, which may therefore put in it what it has copied.

        Raises:
            InvalidName: no collection can have this name.
            StoreFailed: the operating system refused, for instance because the disk is full.
        """
        check_name(collection)
        what = f"a snapshot of collection {collection!r} could not be made"
        with self._making, refusals_named(what):
            folder = self._make_folder(collection)
            created_at = time.time()
            file = folder / f"{_free_name(folder, created_at)}.sqlite"
            try:
                copy(file)
                fsync(file)
                fsync(folder)
                manifest = {
                    "format": _FORMAT,
                    "collection": collection,
                    "name": file.stem,
                    "created_at": created_at,
                    "bytes": file.stat().st_size,
                    "sha256": sha256_of(file),
                    "described": dict(described),
                }
                made = _snapshot(manifest)
                write_manifest(file.with_suffix(".json"), manifest)
            except BaseException:
                _remove(folder, file.stem)
                raise
            return made

    def list(self, collection: str) -> _Snapshots:
        """A collection's snapshots, oldest first; none where it is not known.

        One whose manifest is damaged is left out, with a warning in the log.
        """
        found = []
        for name in self._names(collection):
            try:
                found.append(_snapshot(self._manifest(collection, name)))
            except SnapshotDamaged as error:
                _logger.warning("%s", error)
            except SnapshotNotFound:
                continue  # deleted meanwhile
        return found

    def collections(self) -> _Names:
        """The names of the collections that have snapshots, sorted; they may be deleted by now."""
        return [name for name in self._folders() if self._names(name)]

    def path(self, collection: str, name: str) -> Path:
        """A snapshot's file; raises `SnapshotNotFound`."""
        if name not in self._names(collection):
            raise self._not_found(collection, name)
        return self._root / collection / f"{name}.sqlite"

    def delete(self, collection: str, name: str) -> None:
        """Remove a snapshot; raises `SnapshotNotFound`."""
        folder = self.path(collection, name).parent
        with refusals_named(f"snapshot {name!r} of collection {collection!r} could not be removed"):
            _remove(folder, name)

    def restore_into(self, collection: str, name: str, folder: Path) -> None:
        """Copy a snapshot into an empty folder, as a collection's database; on disk on return.

        Raises:
            SnapshotNotFound.
            SnapshotDamaged: it is not as it was written; nothing is left in the folder.
            StoreFailed: the operating system refused, for instance because the disk is full.
        """
        source = self.path(collection, name)
        manifest = self._manifest(collection, name)
        target = folder / FILE_NAME
        with refusals_named(f"snapshot {name!r} of collection {collection!r} was not restored"):
            target.touch(exist_ok=False)
            try:
                digest = hashlib.sha256()
                with target.open("wb") as file:
                    for piece in self._pieces(source, collection, name):
                        digest.update(piece)
                        file.write(piece)
                if digest.hexdigest() != manifest["sha256"]:
                    raise self._damaged(collection, name, "its checksum differs")
                fsync(target)
                fsync(folder)
            except BaseException:
                target.unlink()
                raise

    def _folders(self) -> _Names:
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if is_name(path.name))

    def _names(self, collection: str) -> _Names:
        """By the manifests that there are, oldest first."""
        if not is_name(collection):
            return []  # and so nothing like `..` becomes a path
        stems = [path.stem for path in (self._root / collection).glob("*.json")]
        return sorted(filter(_NAME.fullmatch, stems), key=_order)

    def _manifest(self, collection: str, name: str) -> dict[str, Any]:
        path = self._root / collection / f"{name}.json"
        try:
            manifest = read_manifest(path, version=_FORMAT)
        except FileNotFoundError as error:
            raise self._not_found(collection, name) from error
        except ManifestDamaged as error:
            raise self._damaged(collection, name, f"its manifest {error.reason}") from error
        if (manifest["collection"], manifest["name"]) != (collection, name):
            reason = f"its manifest is that of {manifest['name']!r} of {manifest['collection']!r}"
            raise self._damaged(collection, name, reason)
        return manifest

    def _pieces(self, file: Path, collection: str, name: str) -> Iterator[memoryview]:
        """`pieces_of`, telling a snapshot that cannot be read from a target that is full."""
        try:
            yield from pieces_of(file)
        except FileNotFoundError as error:
            raise self._damaged(collection, name, "its file is missing") from error
        except OSError as error:
            reason = f"its file cannot be read: {error.strerror or error}"
            raise self._damaged(collection, name, reason) from error

    def _make_folder(self, collection: str) -> Path:
        folder = self._root / collection
        for made in (self._root, folder):
            made.mkdir(exist_ok=True)
            fsync(made.parent)
        return folder

    def _clear_unfinished(self, collection: str) -> None:
        folder = self._root / collection
        with refusals_named(f"the snapshots of collection {collection!r} could not be looked at"):
            for path in folder.iterdir():
                name = path.name.partition(".")[0]
                if _NAME.fullmatch(name) and not (folder / f"{name}.json").exists():
                    path.unlink()
                    _logger.info("removed %s, a snapshot that was not finished", path)

    def _not_found(self, collection: str, name: str) -> SnapshotNotFound:
        names = self._names(collection)
        others = self.collections()
        there = f"it has {names}" if names else "it has none"
        if not names and others:
            there += f"; there are some of {others}"
        return SnapshotNotFound(f"collection {collection!r} has no snapshot {name!r}; {there}")

    def _damaged(self, collection: str, name: str, reason: str) -> SnapshotDamaged:
        others = [each for each in self._names(collection) if each != name]
        return SnapshotDamaged(
            f"snapshot {name!r} of collection {collection!r} is damaged: {reason}. Nothing was "
            f"restored from it. Other snapshots of this collection: {others or 'none'}. Its file "
            f"is a SQLite database, from which the .recover command of sqlite3 may save the rest."
        )


def _snapshot(manifest: Mapping[str, Any]) -> Snapshot:
    described = manifest["described"]
    if not {"count", "model"} <= described.keys():
        raise ValueError(f"described must have 'count' and 'model', it has {sorted(described)}")
    return Snapshot(
        name=manifest["name"],
        collection=manifest["collection"],
        created_at=manifest["created_at"],
        bytes=manifest["bytes"],
        count=described["count"],
        model=described["model"],
    )


def _free_name(folder: Path, created_at: float) -> str:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(created_at))
    names = itertools.chain([stamp], (f"{stamp}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not any(folder.glob(f"{name}.*")))


def _order(name: str) -> tuple[str, int]:
    stamp, _, number = name.partition("-")
    return stamp, int(number or 1)


def _remove(folder: Path, name: str) -> None:
    """The manifest first: what a crash leaves is then unfinished, and cleared at the next start."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    fsync(folder)
    for path in folder.glob(f"{name}.*"):
        path.unlink()
