"""One space's vectors in memory: a structure, and exact blocks of what it lacks yet."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from index.ann import Ann, search_block
from index.effort import candidates
from index.hits import is_filled
from index.kinds import Metric
from index.one_query import Live

BLOCK_ROWS = 16_384

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Found(NamedTuple):
    """Rows that may answer queries: `scores` float32 and `positions` int64 [queries, m].

    A greater score is nearer; position -1 stands where there were fewer. `is_exact` says whether
    the scores are those of the vectors, not of codes for them; `is_whole`, that each query has all
    that it asked for here, best first.
    """

    scores: Floats
    positions: Positions
    is_exact: bool
    is_whole: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Space:
    """Vectors at positions 0 to `rows` - 1: `ann` has the first `built`, `blocks` the others.

    A value: adding gives another `Space`, and a search that began with this one is not disturbed.
    Blocks are shared between them and written only behind what the earlier one reads. One thread at
    a time adds or moves.

    Attributes:
        blocks: (position of the first row, array [BLOCK_ROWS, dimension]), one after the other.
    """

    dimension: int
    metric: Metric
    rows: int = 0
    ann: Ann | None = None
    built: int = 0
    blocks: tuple[tuple[int, Floats], ...] = ()

    def extended(self, vectors: Floats) -> Self:
        """With `vectors` [n, dimension] behind the present rows."""
        blocks, rows, start = list(self.blocks), self.rows, 0
        while start < len(vectors):
            if not blocks or rows == blocks[-1][0] + BLOCK_ROWS:
                blocks.append((rows, np.empty((BLOCK_ROWS, self.dimension), np.float32)))
            first, block = blocks[-1]
            piece = vectors[start : start + BLOCK_ROWS - (rows - first)]
            block[rows - first : rows - first + len(piece)] = piece
            rows += len(piece)
            start += len(piece)
        return replace(self, rows=rows, blocks=tuple(blocks))

    def with_built(self, ann: Ann, built: int) -> Self:
        """With `ann`, which has the first `built` rows; blocks that it has whole are let go."""
        blocks = tuple(each for each in self.blocks if each[0] + BLOCK_ROWS > built)
        return replace(self, ann=ann, built=built, blocks=blocks)

    def unbuilt(self) -> Iterator[tuple[int, Floats]]:
        """What `ann` lacks: (position of the first row, vectors [m, dimension]), in order."""
        for first, block in self.blocks:
            start = max(first, self.built)
            end = min(first + BLOCK_ROWS, self.rows)
            if start < end:
                yield start, block[start - first : end - first]

    def unbuilt_from(self, position: int) -> Iterator[Floats]:
        """The vectors from `position` on, which `ann` lacks."""
        for first, vectors in self.unbuilt():
            yield vectors[max(0, position - first) :]

    def search(
        self, queries: Floats, k: int, *, allowed: Mask | None, effort: int | None = None
    ) -> list[Found]:
        """At least the k best of each query [n, dimension], as far as there are k, in parts.

        Of rows in blocks that score as well as the k-th of their block none is left out.

        Args:
            allowed: which positions count, at least `rows` of them; all without it.
            effort: in place of the one that `ann` is set to.
        """
        found = []
        if self.ann is not None and self.built:
            own = None if allowed is None else allowed[: self.built]
            found.append(self._search_ann(self.ann, queries, k, own, effort))
        for first, vectors in self.unbuilt():
            own = None if allowed is None else allowed[first : first + len(vectors)]
            if own is None or own.any():
                found.append(self._search_block(queries, k, first, vectors, own))
        return found

    def search_one(
        self, query: Floats, k: int, live: Live | None
    ) -> tuple[list[float], list[int]] | None:
        """`search` for one query [dimension]: scores and positions, k of each and best first.

        None where it takes more than one look at a graph that has all rows.
        """
        if self.ann is None or self.built != self.rows or k > self.rows:
            return None
        found = self.ann.search_one(query, k, live)
        # The graph may have been given rows that are not of this value.
        return None if found is None or max(found[1]) >= self.rows else found

    @property
    def memory_bytes(self) -> int:
        """What the structure and the blocks take; of a block, what was written of it."""
        rows = self.rows - self.blocks[0][0] if self.blocks else 0
        structure = 0 if self.ann is None else self.ann.memory_bytes
        return 4 * rows * self.dimension + structure

    def _search_ann(
        self, ann: Ann, queries: Floats, k: int, allowed: Mask | None, effort: int | None
    ) -> Found:
        wanted = candidates(ann.kind, k)
        scores, positions = ann.search(queries, wanted, allowed=allowed, effort=effort)
        if len(ann) > self.built:
            # It has been given rows since. Those that blocks have here are found there; later ones
            # must not take the places of others.
            if positions.max(initial=-1) >= self.rows:
                allowed = np.ones(self.built, np.bool_)
                scores, positions = ann.search(queries, wanted, allowed=allowed, effort=effort)
            positions = np.where(positions < self.built, positions, -1)
        exact = ann.holds_vectors
        is_whole = exact and self.built == self.rows and is_filled(positions, wanted)
        return Found(scores, positions, exact, is_whole)

    def _search_block(
        self, queries: Floats, k: int, first: int, vectors: Floats, allowed: Mask | None
    ) -> Found:
        fetched = min(k + 1, len(vectors))
        while True:
            scores, positions = search_block(queries, vectors, fetched, self.metric, allowed)
            # One more than k shows whether rows of equal score stand on both sides of the cut.
            is_cut = fetched > k and bool(
                ((scores[:, k - 1] == scores[:, -1]) & (positions[:, -1] >= 0)).any()
            )
            if not is_cut or fetched == len(vectors):
                break
            fetched = min(4 * fetched, len(vectors))
        return Found(scores, np.where(positions >= 0, positions + first, -1), is_exact=True)
