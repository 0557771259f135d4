"""The work on one collection's indexes that nobody waits for: building, tuning, saving."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from index.ann import Ann
from index.cache import note_effort, read_cache, write_cache
from index.errors import StoreFailed
from index.kinds import Kind, choose_kind, is_trained, training_rows
from index.loading import Saved, described, vectors_at
from index.mirror import Mirror
from index.recall import recall, take_sample
from index.records import prepared
from index.space import Space
from index.view import Rows, View

_logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 2048
_PROGRESS_S = 10.0
_SAVE_AGAIN_S = 60.0
_TUNE_AGAIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class BuildPolicy:
    """When background work is worth doing.

    Attributes:
        save_rows: an index is saved once so many of its rows are not on disk,
        save_share: and they are this part of all its rows.
        compact_rows: removed rows are cleared out of the indexes once there are so many,
        compact_share: and they are this part of all. Rows that an index on disk cannot take
            (`mapped`) are built into it at the same two limits.
        tune_share: recall is measured, and the effort of a search set by it, whenever the rows have
            grown by this part.
    """

    save_rows: int = 10_000
    save_share: float = 0.1
    compact_rows: int = 1_000
    compact_share: float = 0.25
    tune_share: float = 0.5


class Maintenance:
    """What there is to be done for one collection, in steps.

    Attributes:
        recall: space -> recall@10 as last measured; absent before that.
    """

    def __init__(self, mirror: Mirror, policy: BuildPolicy) -> None:
        self.recall: dict[str, float] = {}
        self._mirror = mirror
        self._policy = policy
        self._rebuilds_asked = self._rebuilds_done = 0
        self._is_asked = False
        self._is_closing = False
        self._tuned_rows: dict[str, int] = {}
        self._work: Iterator[None] | None = None
        self._later: dict[str, float] = {}  # what was put off -> until when (time.monotonic())
        for name, saved in mirror.saved.items():
            if saved.recall is not None and saved.recall >= mirror.settings.target_recall:
                self.recall[name], self._tuned_rows[name] = saved.recall, saved.rows

    def ask(self) -> None:
        """Something has changed: what is under way is not the last there is to do."""
        self._is_asked = True

    def force_rebuild(self) -> None:
        """Build every index anew from the store."""
        self._rebuilds_asked += 1

    def force_tuning(self) -> None:
        """Measure recall, and set the effort of a search by it, whether rows were added or not."""
        self._tuned_rows = dict.fromkeys(self._tuned_rows, 0)

    @property
    def again_at(self) -> float | None:
        """When there is something to be tried again (time.monotonic()); None: nothing is."""
        return None if self._is_closing else min(self._later.values(), default=None)

    def stop(self) -> None:
        """Let the running step end soon, and let no further one begin."""
        self._is_closing = True

    def step(self) -> bool:
        """Do the next piece of work; False when there is none."""
        if self._is_closing:
            return False
        if self._work is None:
            self._is_asked = False
            now = time.monotonic()
            self._later = {what: until for what, until in self._later.items() if until > now}
            self._work = self._all_work()
        try:
            next(self._work)
        except StopIteration:
            self._work = None
            return self._is_asked
        except BaseException:
            self._work = None
            raise
        return True

    def save_unsaved(self) -> None:
        """Save what is worth it before the collection closes."""
        for name in self._mirror.store.spaces:
            if self._unsaved_rows(name) >= self._policy.save_rows // 10:
                self._save(name)

    def _all_work(self) -> Iterator[None]:
        mirror = self._mirror
        view = mirror.current()
        kind = choose_kind(mirror.settings, view.count - view.dead, _present_kind(view))
        if self._needs_rebuild(view, kind):
            yield from self._rebuild(kind)
        for name in mirror.store.spaces:
            if kind not in ("flat", "mapped"):
                yield from self._absorb(name, kind)
            if (ann := mirror.view.spaces[name].ann) is None:
                self.recall[name] = 1.0
                continue
            ann.settle(should_stop=self._should_stop)
            yield
            yield from self._tune(name)
            unsaved, rows = self._unsaved_rows(name), mirror.view.spaces[name].built
            if unsaved >= max(self._policy.save_rows, self._policy.save_share * rows):
                self._save(name)
                yield

    def _needs_rebuild(self, view: View, kind: Kind) -> bool:
        def is_much(rows: int) -> bool:
            limit = max(self._policy.compact_rows, self._policy.compact_share * view.count)
            return rows >= limit

        if self._rebuilds_done < self._rebuilds_asked or is_much(view.dead):
            return True
        for space in view.spaces.values():
            if space.ann is None:
                if kind == "mapped":
                    return True
            elif (
                space.ann.kind != kind
                or (space.ann.structure != self._mirror.settings.structure() and kind != "flat")
                or (not space.ann.can_add and is_much(space.rows - space.built))
            ):
                return True
        return False

    def _rebuild(self, kind: Kind) -> Iterator[None]:
        """New structures beside the old ones, which answer until the new ones are whole."""
        asked = self._rebuilds_asked
        mirror, loads = self._mirror, self._mirror.loads
        view = mirror.view
        numbers = view.numbers[: view.count][view.live[: view.count]]
        _logger.info(
            "collection %r: building its %s index of %d rows anew", mirror.name, kind, len(numbers)
        )
        started = time.monotonic()
        self._tuned_rows = dict.fromkeys(mirror.store.spaces, 0)  # what is known is of the old ones
        spaces: dict[str, Space] = {}
        for name, dimension in mirror.store.spaces.items():
            space = Space(dimension=dimension, metric=mirror.store.metric)
            vectors = vectors_at(mirror.store, mirror.name, name, numbers)
            if kind == "flat":
                for block in vectors:
                    space = space.extended(block)
                    yield
            else:
                ann = self._train(name, kind, numbers)
                for block in vectors:
                    ann.add(block, should_stop=self._should_stop)
                    yield
                if kind == "mapped":
                    self._write(name, ann, numbers)
                    ann = self._mapped(name, ann)
                space = replace(space, rows=len(numbers), ann=ann, built=len(numbers))
            spaces[name] = space
        if not mirror.replace_all(numbers, spaces, after=view.last, loads=loads):
            self._is_asked = True  # again, from what was read meanwhile
            return
        self._rebuilds_done = asked
        if kind != "mapped":
            for name, saved in mirror.saved.items():  # what is on disk is of use until the next
                mirror.saved[name] = replace(saved, rows=0)
        _logger.info("collection %r: built in %.1f s", mirror.name, time.monotonic() - started)

    def _absorb(self, name: str, kind: Kind) -> Iterator[None]:
        """Put what is in blocks into the structure, piece by piece; make it if it is not there."""
        mirror, loads = self._mirror, self._mirror.loads
        view = mirror.view
        if view.spaces[name].ann is None:
            numbers = view.numbers[: view.count][view.live[: view.count]]
            ann = self._train(name, kind, numbers)
            mirror.put_built(name, ann, 0, loads=loads)
            yield
        told = time.monotonic()
        while True:
            loads, space = mirror.loads, mirror.view.spaces[name]
            if space.ann is None or space.built == space.rows:
                return
            ann = space.ann
            if len(ann) == space.built:  # it has more where the last rows were not put to use
                _, vectors = next(space.unbuilt())
                try:
                    ann.add(vectors[:_ROWS_AT_ONCE], should_stop=self._should_stop)
                except BaseException:
                    mirror.reload()  # the structure may be half changed, and answers meanwhile
                    raise
            built = len(ann)
            mirror.put_built(name, ann, built, loads=loads)
            if time.monotonic() > told + _PROGRESS_S:
                told = time.monotonic()
                _logger.info(
                    "collection %r, space %r: %d of %d vectors in the %s index",
                    *(mirror.name, name, built, space.rows, kind),
                )
            yield

    def _tune(self, name: str) -> Iterator[None]:
        """Choose the least effort of a search that finds the part of neighbours asked for."""
        mirror, loads = self._mirror, self._mirror.loads
        view = mirror.view
        ann, tuned = view.spaces[name].ann, self._tuned_rows.get(name)
        is_recent = tuned and view.count < tuned * (1 + self._policy.tune_share)
        if ann is None or is_recent or f"tuning {name}" in self._later:
            return
        sample = yield from take_sample(mirror, view, name)
        if sample is None:
            return
        # An index that was saved knows its effort; it is only looked whether that still does.
        is_known = tuned is None and name in mirror.saved
        measured = 0.0
        for effort in [ann.effort] * is_known + list(ann.efforts):
            found = recall(mirror, name, sample, effort=effort)
            yield
            if found is None or loads != mirror.loads:
                # Records go faster than they are counted; a scan of all is not for every write.
                self._later[f"tuning {name}"] = time.monotonic() + _TUNE_AGAIN_S
                return
            measured = found
            if measured >= mirror.settings.target_recall:
                break
        ann.effort = effort
        self.recall[name] = measured
        self._tuned_rows[name] = max(view.count, 1)
        self._note_effort(name, ann)
        _logger.info(
            "collection %r, space %r: recall@10 %.4f at effort %d",
            *(mirror.name, name, measured, effort),
        )

    def _note_effort(self, name: str, ann: Ann) -> None:
        """Let the index on disk know, so that the next start need not tune again."""
        mirror, saved = self._mirror, self._mirror.saved.get(name)
        if saved is not None and saved.generation:
            try:
                note_effort(
                    mirror.store.folder,
                    name,
                    generation=saved.generation,
                    kind=ann.kind,
                    effort=ann.effort,
                    recall=self.recall[name],
                )
            except StoreFailed as error:
                _logger.warning("%s; it is measured again at the next start", error)

    def _train(self, name: str, kind: Kind, numbers: Rows) -> Ann:
        mirror = self._mirror
        sample = None
        if is_trained(kind):
            rows = training_rows(mirror.settings, len(numbers))
            chosen = np.random.default_rng(0).choice(numbers, rows, replace=False)
            _, vectors = mirror.store.vectors_of(name, np.sort(chosen))
            sample = prepared(vectors, mirror.store.metric)
        return Ann.train(
            kind,
            mirror.store.spaces[name],
            mirror.store.metric,
            mirror.settings,
            sample,
            expected_rows=len(numbers),
        )

    def _mapped(self, name: str, written: Ann) -> Ann:
        store = self._mirror.store
        expected = described(store, name, written.structure)
        cached = read_cache(store.folder, name, described=expected)
        if cached is None:
            raise StoreFailed(f"{store.folder}: the index that was just saved has gone")
        return Ann.load(
            cached.path,
            "mapped",
            store.metric,
            structure=written.structure,
            effort=written.effort,
        )

    def _save(self, name: str) -> None:
        view = self._mirror.view
        space = view.spaces[name]
        if space.ann is None or "saving" in self._later:
            return
        try:
            self._write(name, space.ann, view.numbers[: space.built])
        except StoreFailed as error:
            # The index on disk is a cache: what it lacks is read from the store at the next start.
            self._later["saving"] = time.monotonic() + _SAVE_AGAIN_S
            _logger.warning("%s; it is tried again in %.0f s", error, _SAVE_AGAIN_S)

    def _write(self, name: str, ann: Ann, numbers: Rows) -> None:
        store, saved = self._mirror.store, self._mirror.saved
        before = saved.get(name, Saved(generation=0, rows=0))
        # A number is used up even where the write fails.
        saved[name] = replace(before, generation=before.generation + 1)
        write_cache(
            store.folder,
            name,
            save=ann.save,
            numbers=numbers,
            kind=ann.kind,
            effort=ann.effort,
            recall=self.recall.get(name) if self._tuned_rows.get(name) else None,
            described=described(store, name, ann.structure),
            generation=saved[name].generation,
        )
        saved[name] = replace(saved[name], rows=len(numbers))

    def _should_stop(self) -> bool:
        return self._is_closing

    def _unsaved_rows(self, name: str) -> int:
        saved = self._mirror.saved.get(name)
        return self._mirror.view.spaces[name].built - (0 if saved is None else saved.rows)


def _present_kind(view: View) -> Kind:
    """What the first space has; of all, the same is asked."""
    ann = next(iter(view.spaces.values())).ann
    return "flat" if ann is None else ann.kind
