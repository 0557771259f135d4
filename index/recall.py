"""How many of the true nearest rows a search finds, by an exact scan for a sample of the rows."""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.ann import search_block
from index.loading import vectors_at
from index.mirror import Mirror
from index.view import Rows, View, prepared

K = 10
QUERIES = 100
_TRIES = 3


@dataclass(frozen=True, eq=False)
class Sample:
    """Vectors of the collection as queries, and the true K nearest of each, itself left out.

    `last` is the highest row that was looked at.
    """

    rows: Rows
    queries: NDArray[np.float32]
    nearest: list[set[int]]
    last: int


def take_sample(mirror: Mirror, view: View, space: str) -> Generator[None, None, Sample | None]:
    """Scan the store for the neighbours of some of its rows, the same ones for the same rows.

    In steps. Returns None where there are not two rows.
    """
    metric = view.spaces[space].metric
    live = view.numbers[: view.count][view.live[: view.count]]
    if len(live) < 2:
        return None
    chosen = np.random.default_rng(0).choice(live, min(QUERIES, len(live)), replace=False)
    rows, queries = mirror.store.vectors_of(space, np.sort(chosen))
    queries = prepared(queries, metric)
    scores = np.empty((len(rows), 0), np.float32)
    found = np.empty((len(rows), 0), np.int64)
    done = 0
    for vectors in vectors_at(mirror.store, mirror.name, space, live):
        yield
        own = search_block(queries, vectors, min(K + 1, len(vectors)), metric, None)
        scores = np.concatenate([scores, own[0]], axis=1)
        found = np.concatenate([found, live[done + own[1]]], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : K + 1]
        scores = np.take_along_axis(scores, best, axis=1)
        found = np.take_along_axis(found, best, axis=1)
        done += len(vectors)
    nearest = [set(each.tolist()) - {row} for row, each in zip(rows.tolist(), found, strict=True)]
    return Sample(rows, queries, nearest, last=view.last)


def recall(mirror: Mirror, space: str, sample: Sample, *, effort: int) -> float | None:
    """The part of the sample's true neighbours that a search finds, of those still there.

    None where rows go faster than one can look.
    """
    for _ in range(_TRIES):
        view = mirror.current()
        numbers = view.numbers[: view.count]
        allowed = view.allowed(numbers <= sample.last if view.last > sample.last else None)
        results = mirror.nearest(view, space, sample.queries, K + 1, allowed, effort=effort)
        if results is not None:
            break
    else:
        return None
    there = set(numbers[view.live[: view.count]].tolist())
    found = wanted = 0
    for row, nearest, (_, at) in zip(sample.rows.tolist(), sample.nearest, results, strict=True):
        still = nearest & there
        found += len(still & (set(numbers[at].tolist()) - {row}))
        wanted += len(still)
    return found / max(wanted, 1)
