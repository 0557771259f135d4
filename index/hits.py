"""What a search finds: the best of each query, filled up where there were fewer."""

import numpy as np
from numpy.typing import NDArray

from index.kinds import Metric

Hits = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores and positions [q, k], best first; -inf and -1 where fewer than k were found."""


def no_hits(queries: int, k: int) -> Hits:
    """Room for k of each query, with nothing in it."""
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)


def put_hits(
    found: Hits, metric: Metric, scores: NDArray[np.float32], positions: NDArray[np.int64]
) -> None:
    """Put what faiss found into the first columns of `scores` and `positions`.

    Of l2 it gives squared distances, and the greater score is to be the nearer.
    """
    width = found[0].shape[1]
    better = -found[0] if metric == "l2" else found[0]
    scores[:, :width] = np.where(found[1] < 0, -np.inf, better)
    positions[:, :width] = found[1]


def best_hits(one: Hits, other: Hits) -> Hits:
    """The k best of two findings [q, k]; of equal scores the first finding's come first."""
    scores = np.concatenate([one[0], other[0]], axis=1)
    positions = np.concatenate([one[1], other[1]], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : one[0].shape[1]]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)


def is_filled(positions: NDArray[np.int64], k: int) -> bool:
    """Whether every query has as many as k."""
    if len(positions) == 1:  # numpy takes 5 µs to look at an array of one
        return bool(positions.item(0, k - 1) >= 0)
    return bool((positions[:, k - 1] >= 0).all())
