"""How many of the true nearest rows a search finds, by an exact scan for queries made of the rows.

A row of the collection is too easy a query: it is linked to its own neighbours. Recall of rows was
.998 where that of vectors that were not there was .994 (100,000 of 384 dimensions). So a query is a
row moved by the difference of two of its neighbours, which lies as new vectors do (.994).
"""

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.ann import search_block
from index.loading import vectors_at
from index.mirror import Mirror
from index.records import prepared
from index.view import View

K = 10
QUERIES = 200
_TRIES = 3
_ROUNDING = 1e-5  # between the scores of a scan and those of a search


class Sample(NamedTuple):
    """Queries [q, dimension], and of each the true K nearest rows and the score of the last.

    Equal vectors are as good as one another, so it is the scores that are compared. `last` is the
    highest row that was looked at.
    """

    queries: NDArray[np.float32]
    nearest: list[set[int]]
    least: NDArray[np.float32]
    last: int


def take_sample(mirror: Mirror, view: View, space: str) -> Generator[None, None, Sample | None]:
    """Make queries and scan the store for their neighbours, the same ones for the same rows.

    In steps. Returns None where there are not two rows, or rows go faster than one can look.
    """
    metric = view.spaces[space].metric
    live = view.numbers[: view.count][view.live[: view.count]]
    if len(live) < 2:
        return None
    queries = _queries(mirror, view, space)
    if queries is None:
        return None
    scores = np.empty((len(queries), 0), np.float32)
    found = np.empty((len(queries), 0), np.int64)
    done = 0
    for vectors in vectors_at(mirror.store, mirror.name, space, live):
        yield
        own = search_block(queries, vectors, min(K, len(vectors)), metric, None)
        scores = np.concatenate([scores, own[0]], axis=1)
        found = np.concatenate([found, live[done + own[1]]], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        scores = np.take_along_axis(scores, best, axis=1)
        found = np.take_along_axis(found, best, axis=1)
        done += len(vectors)
    return Sample(queries, [set(each.tolist()) for each in found], scores[:, -1], view.last)


def recall(mirror: Mirror, space: str, sample: Sample, *, effort: int) -> float | None:
    """The part of the sample's true neighbours that a search finds, of those still there.

    None where rows go faster than one can look.
    """
    for _ in range(_TRIES):
        view = mirror.current()
        numbers = view.numbers[: view.count]
        allowed = view.allowed(numbers <= sample.last if view.last > sample.last else None)
        results = mirror.nearest(view, space, sample.queries, K, allowed, effort=effort)
        if results is not None:
            break
    else:
        return None
    there = set(numbers[view.live[: view.count]].tolist())
    found = wanted = 0
    for nearest, least, (scores, _) in zip(sample.nearest, sample.least, results, strict=True):
        still = len(nearest & there)
        found += min(still, int(np.count_nonzero(scores >= least - _ROUNDING * max(1, abs(least)))))
        wanted += still
    return found / max(wanted, 1)


def _queries(mirror: Mirror, view: View, space: str) -> NDArray[np.float32] | None:
    metric, random = view.spaces[space].metric, np.random.default_rng(0)
    live = view.numbers[: view.count][view.live[: view.count]]
    chosen = np.sort(random.choice(live, min(QUERIES, len(live)), replace=False))
    rows, vectors = mirror.store.vectors_of(space, chosen)
    vectors = prepared(vectors, metric)
    around = mirror.nearest(view, space, vectors, K + 1, view.allowed(None))
    if around is None or not len(rows):
        return None
    picked = [random.choice(view.numbers[at], 2) for _, at in around]
    wanted, which = np.unique(np.concatenate(picked), return_inverse=True)
    there, others = mirror.store.vectors_of(space, wanted)
    if len(there) < len(wanted):
        return None
    moved = prepared(others, metric)[which].reshape(len(rows), 2, -1)
    made = vectors + moved[:, 0] - moved[:, 1]
    made[~made.any(axis=1)] = vectors[~made.any(axis=1)]  # of no direction
    return prepared(made, metric)
