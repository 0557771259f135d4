"""A store's rows in memory: kept in step with each commit, and searched."""

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from index import loading
from index.ann import Ann
from index.columns import MISSING, Column, sqlite_path
from index.commits import GroupCommit
from index.errors import StoreDamaged
from index.filters import Filter
from index.records import Match, prepared
from index.side_by_side import side_by_side
from index.space import Found, Mask, Positions, Space
from index.store import Store
from index.view import Rows, View
from index.writes import Changes

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_TRIES = 5
_QUERIES_AT_ONCE = 128
_TAKEN_AT_ONCE = 4096


class Mirror:
    """What is searched of a store, and the way by which the store is written.

    Attributes:
        commits: whoever writes the store does it through this.
        view: what the last commit left. Searches take it and need no lock.
        saved: space -> what of its index is on disk.
        settings: the kind of index that is asked for.
        loads: how many times the store was read as a whole. Each time rows take other positions, so
            that what was begun before is of no use after.
    """

    def __init__(self, store: Store, *, name: str) -> None:
        self.store = store
        self.name = name
        self.commits = GroupCommit(store.database, self)
        self.settings = store.settings
        self._changing = threading.RLock()
        self._reading_columns = threading.Lock()
        self._changed_rows: list[set[int]] = []  # since a column is being read, for each of those
        self._is_lost = False
        self.view, self.saved = loading.load(store, name=name)
        self.loads = 1

    def follow(self, changes: Sequence[Changes]) -> None:
        """Take over what was committed. Whatever happens here, the commit stands."""
        try:
            with self._changing:
                view = self.view
                for each in changes:
                    view = view.after(each)
                    for rows in self._changed_rows:
                        rows.update(each.added.tolist(), each.relabelled)
                self.view = view
        except Exception:
            _logger.exception("collection %r: its rows are read anew when next needed", self.name)
            self.lose_track()
        except BaseException:  # an interrupt: leave now, and read when next needed
            self.lose_track()
            raise

    def lose_track(self) -> None:
        """The rows in memory may not be those of the store."""
        self._is_lost = True

    def reload(self) -> None:
        """Read the store as if it had just been opened."""
        with self.commits.paused():
            self._load()

    def between_writes(self, read: Callable[[], T]) -> T:
        """What `read` gives of memory and store when nothing is written between its looks at them.

        It is called again until that is so, in the end while writes wait.
        """
        for _ in range(_TRIES):
            before = self.commits.sequence
            found = read()
            if before % 2 == 0 and before == self.commits.sequence:
                return found
        with self.commits.paused():
            return read()

    def put_built(self, name: str, ann: Ann, built: int, *, loads: int) -> bool:
        """Let a space be searched through `ann`, which has its first `built` rows.

        False, and nothing is changed, where the store was read anew since `loads` was taken.
        """
        with self._changing:
            if loads != self.loads:
                return False
            space = self.view.spaces[name].with_built(ann, built)
            self.view = self.view.with_space(name, space)
        return True

    def replace_all(
        self, numbers: Rows, spaces: Mapping[str, Space], *, after: int, loads: int
    ) -> bool:
        """Put structures built from the store, of the rows `numbers`, in place of all present ones.

        What has come above the row `after` since is taken over from the present ones, which must
        have it in blocks. False, and nothing is changed, where the store was read anew since
        `loads` was taken.
        """
        with self._noting_changes() as relabelled:
            view = self.view
            while len(view.rows_above(after)) > _TAKEN_AT_ONCE and loads == self.loads:
                numbers, spaces = view.taken_over(numbers, spaces, after=after)
                after, view = view.last, self.view
            if loads != self.loads:
                return False
            labels = view.labels_of(numbers)
            with self._changing:  # what has come since is little, and whoever writes waits for it
                if loads != self.loads:
                    return False
                numbers, spaces = self.view.taken_over(numbers, spaces, after=after)
                self.view = self.view.rearranged(
                    numbers, spaces, labels=labels, relabelled=relabelled
                )
        return True

    @contextmanager
    def _noting_changes(self) -> Iterator[set[int]]:
        """The rows that are added or relabelled inside the block, as commits are followed."""
        noted = set[int]()
        with self._changing:
            self._changed_rows.append(noted)
        try:
            yield noted
        finally:
            with self._changing:
                self._changed_rows = [each for each in self._changed_rows if each is not noted]

    def forget(self) -> None:
        """Let the memory go, after the store was closed."""
        with self._changing:
            self.view = View.empty(self.store.spaces, self.store.metric)

    def current(self) -> View:
        """The view, read anew where an interrupt has left it behind."""
        if self.store.database.is_closed:
            raise self.store.database.gone()
        if self._is_lost:
            with self.commits.paused():
                if self._is_lost:  # and nobody else has read them meanwhile
                    self._load()
        return self.view

    def select(self, chosen: Filter | None) -> tuple[View, Mask | None]:
        """A view, and which of its positions pass the filter, live or not; None: all."""
        while True:
            view = self.current()
            if chosen is None:
                return view, None
            columns = view.table.columns(chosen.keys)
            if len(columns) == len(chosen.keys):
                return view, chosen.mask(columns, view.count)
            view, columns = self._read_columns(chosen.keys)
            if len(columns) == len(chosen.keys):
                return view, chosen.mask(columns, view.count)

    def matching_rows(self, chosen: Filter | None) -> Rows:
        """The rows that pass the filter, sorted."""
        view, mask = self.select(chosen)
        allowed = view.allowed(mask)
        numbers = view.numbers[: view.count]
        return numbers if allowed is None else numbers[allowed]

    def search(
        self,
        space: str,
        queries: NDArray[np.float32],
        k: int,
        *,
        chosen: Filter | None = None,
        exclude: Sequence[str] = (),
    ) -> list[list[Match]]:
        """The k nearest records to each query [n, dimension] that pass `chosen`, best first.

        Equal scores of a flat index stand in the order of the vectors' writing.
        """
        starts = range(0, len(queries), _QUERIES_AT_ONCE)

        def search(start: int) -> list[list[Match]]:
            piece = queries[start : start + _QUERIES_AT_ONCE]
            for _ in range(_TRIES):
                found = self._try_search(space, piece, k, chosen, exclude)
                if found is not None:
                    return found
            with self.commits.paused():
                found = self._try_search(space, piece, k, chosen, exclude)
            if found is None:
                raise StoreDamaged(f"collection {self.name!r}: records have gone from its file")
            return found

        # Side by side, but for who has paused the writes: other threads might wait for that.
        apart = len(starts) > 1 and not self.commits.is_paused_here
        pieces = side_by_side(search, starts) if apart else map(search, starts)
        return [matches for piece in pieces for matches in piece]

    def search_one(self, space: str, query: NDArray[np.float32], k: int) -> list[Match] | None:
        """`search` for one query [dimension] among all records.

        None where that takes more than one look at a graph. Most searches do not, and of each the
        steps of `search` would be a tenth.
        """
        view = self.current()
        found = view.spaces[space].search_one(query, k, view.remaining)
        return None if found is None else self._matches(view, *found)

    def nearest(
        self,
        view: View,
        space: str,
        queries: NDArray[np.float32],
        k: int,
        allowed: Mask | None,
        *,
        effort: int | None = None,
    ) -> list[tuple[NDArray[np.float32], Positions]] | None:
        """(scores, positions) for each query, best first; None where the store lacks a vector now.

        `effort` stands in place of the one that the space's structure is set to.
        """
        own = view.spaces[space]
        parts = []
        for part in own.search(queries, k, allowed=allowed, effort=effort):
            if not part.is_exact:
                again = self._rescored(view, space, queries, part)
                if again is None:
                    return None
                part = again
            parts.append(part)
        if not parts:
            empty = np.empty(0, np.float32), np.empty(0, np.int64)
            return [empty for _ in queries]
        scores, positions = parts[0].scores, parts[0].positions
        if parts[0].is_whole:
            return list(zip(scores, positions, strict=True))
        if len(parts) > 1:
            scores = np.concatenate([part.scores for part in parts], axis=1)
            positions = np.concatenate([part.positions for part in parts], axis=1)
        found = []
        for row_scores, row_positions in zip(scores, positions, strict=True):
            is_one = row_positions >= 0
            row_scores, row_positions = row_scores[is_one], row_positions[is_one]
            order = np.lexsort((row_positions, -row_scores))[:k]
            found.append((row_scores[order], row_positions[order]))
        return found

    def _load(self) -> None:
        with self._changing:
            self.view, self.saved = loading.load(self.store, name=self.name)
            self.loads += 1
            self._is_lost = False

    def _try_search(
        self,
        space: str,
        queries: NDArray[np.float32],
        k: int,
        chosen: Filter | None,
        exclude: Sequence[str],
    ) -> list[list[Match]] | None:
        """None where records that were found have been changed meanwhile."""
        view, mask = self.select(chosen)
        allowed = view.allowed(mask, self.store.rows_of(exclude) if exclude else ())
        found = self.nearest(view, space, queries, k, allowed)
        if found is None:
            return None
        is_distance = view.spaces[space].metric == "l2"
        all_matches: list[list[Match]] = []
        for scores, positions in found:
            if is_distance:  # squared so far
                scores = -np.sqrt(-scores)
            own = self._matches(view, scores.tolist(), positions.tolist())
            # An excluded record may have other vectors by now, in a row that the view lacks.
            if own is None or (exclude and any(match.id in exclude for match in own)):
                return None
            all_matches.append(own)
        metadata = [match.metadata for own in all_matches for match in own] if chosen else []
        return all_matches if chosen is None or chosen.matches(metadata).all() else None

    def _matches(self, view: View, scores: list[float], positions: list[int]) -> list[Match] | None:
        """None where the store lacks a record now."""
        ids, texts = view.labels.of(positions)
        if "" in texts:
            lacking = {
                i: int(view.numbers[positions[i]]) for i, text in enumerate(texts) if not text
            }
            stored = self.store.labels_of(lacking.values())
            for i, row in lacking.items():
                if row not in stored:
                    return None
                ids[i], texts[i] = stored[row]
        return list(map(Match, ids, scores, texts))

    def _rescored(
        self, view: View, space: str, queries: NDArray[np.float32], part: Found
    ) -> Found | None:
        metric = view.spaces[space].metric
        wanted = np.unique(part.positions[part.positions >= 0])
        rows, vectors = self.store.vectors_of(space, view.numbers[wanted])
        if len(rows) != len(wanted):
            return None
        vectors = prepared(vectors, metric)
        scores = np.full(part.scores.shape, -np.inf, np.float32)
        for i, positions in enumerate(part.positions):
            is_one = positions >= 0
            own = vectors[np.searchsorted(wanted, positions[is_one])]
            scores[i, is_one] = _scores(queries[i], own, metric)
        return Found(scores, part.positions, is_exact=True)

    def _read_columns(self, keys: frozenset[str]) -> tuple[View, Mapping[str, Column]]:
        """Read what is missing; a view, and its columns."""
        # One thread reads and others find it done; who keeps that one from its end may not wait.
        one_at_a_time = nullcontext() if self.commits.is_paused_here else self._reading_columns
        with one_at_a_time:
            for key in keys - self.current().table.columns(keys).keys():
                while not self._add_column(key, beside=keys):
                    pass
            view = self.current()
            return view, view.table.columns(keys)

    def _add_column(self, key: str, *, beside: frozenset[str]) -> bool:
        """Read one key of all metadata while writes go on; False: it is to be done again.

        What changes meanwhile is put in at the end, when nothing is written for a moment.
        """
        with self._noting_changes() as changed:
            self.current()
            loads = self.loads
            with closing(self.store.values_at(sqlite_path(key))) as blocks:
                rows, column = self._read_column(key, blocks)
            with self.commits.paused():
                view = self.current()
                if loads != self.loads:
                    return False
                numbers = view.numbers[: view.count]
                column.extend([MISSING])  # for the rows that have come since, or have gone
                at = np.searchsorted(rows, numbers)
                at[np.append(rows, -1)[at] != numbers] = len(rows)
                column = column.at(at)
                for block in self.store.values_at(sqlite_path(key), among=sorted(changed)):
                    for row, text in block:
                        value = MISSING if text is None else json.loads(text)
                        column.set(int(np.searchsorted(numbers, row)), value)
                view.table.add({key: column}, beside=beside)
        return True

    def _read_column(
        self, key: str, blocks: Iterable[list[tuple[int, str | None]]]
    ) -> tuple[Rows, Column]:
        column = Column(key)
        rows: list[int] = []
        try:
            for block in blocks:
                rows += [row for row, _ in block]
                column.extend_json([text for _, text in block])
        except ValueError as error:
            raise self.store.database.damage("a record's metadata is garbled") from error
        return np.array(rows, dtype=np.int64), column


def _scores(
    query: NDArray[np.float32], vectors: NDArray[np.float32], metric: str
) -> NDArray[np.float32]:
    if metric == "l2":
        distances: NDArray[np.float32] = np.square(vectors - query).sum(axis=1)
        return -distances
    products: NDArray[np.float32] = vectors @ query
    return products
