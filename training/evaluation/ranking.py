"""Figures of ranked lists, and the k best of a database that is streamed past the queries."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KAPPAS = (1, 5, 10)


class Relevant(NamedTuple):
    """A query's ground truth, as places in the database.

    Attributes:
        ok: what should be found.
        junk: what is passed over, as if it were not in the database.
    """

    ok: Sequence[int]
    junk: Sequence[int] = ()


class RankedFigures(NamedTuple):
    """Shares of 1; None where no query has anything to be found.

    Attributes:
        map: the mean of `aps` over the queries that have something to be found.
        aps: the average precision of each query; None where it has nothing to be found.
        mp_at: k -> the mean of "how many of the first k are right" over k.
        mp_at_as_published: the same as the original computes it: k is the rank of the last
            positive, where that is smaller.
    """

    map: float | None
    aps: list[float | None]
    mp_at: dict[int, float | None]
    mp_at_as_published: dict[int, float | None]


def average_precision(ranks: Sequence[int], positives: int) -> float:
    """The area under precision over recall by trapezoids, as Oxford5k and Holidays define it.

    Args:
        ranks: of the positives that were found, from 0 up, rising.
        positives: how many there are to be found; what was not found adds nothing.

    Raises:
        ValueError: `positives` is less than the number of ranks, or than 1.
    """
    if positives < max(1, len(ranks)):
        raise ValueError(f"positives is {positives}; {len(ranks)} were found, and 1 is the least")
    area = 0.0
    for found, rank in enumerate(ranks):
        before = found / rank if rank else 1.0
        area += (before + (found + 1) / (rank + 1)) / 2
    return area / positives


def ranked_figures(
    ranks: NDArray[np.int64], truth: Sequence[Relevant], kappas: Sequence[int] = KAPPAS
) -> RankedFigures:
    """mAP and mP@k by the protocol of revisited Oxford and Paris (arXiv 1803.11285).

    Args:
        ranks: [N, Q], each column the database's places, best first.
        truth: of each query.

    Raises:
        ValueError: as many ground truths as queries are needed.
    """
    if ranks.shape[1] != len(truth):
        raise ValueError(f"ranks have {ranks.shape[1]} queries, and truth has {len(truth)}")
    aps: list[float | None] = []
    precise: list[list[float]] = []
    as_published: list[list[float]] = []
    for column, (ok, junk) in zip(ranks.T, truth, strict=True):
        if len(ok) == 0:
            aps.append(None)
            continue
        places = np.flatnonzero(np.isin(column, ok))
        places -= np.searchsorted(np.flatnonzero(np.isin(column, junk)), places)
        aps.append(average_precision(places.tolist(), len(ok)))
        last = int(places[-1]) + 1 if len(places) else max(kappas)
        cut = [min(last, k) for k in kappas]
        precise.append([(places < k).sum() / k for k in kappas])
        as_published.append([(places < k).sum() / k for k in cut])
    return RankedFigures(
        map=mean([ap for ap in aps if ap is not None]),
        aps=aps,
        mp_at={k: mean([row[i] for row in precise]) for i, k in enumerate(kappas)},
        mp_at_as_published={
            k: mean([row[i] for row in as_published]) for i, k in enumerate(kappas)
        },
    )


def micro_average_precision(scores: Tensor, correct: Tensor, positives: int) -> float:
    """Average precision of all pairs in one list by falling score (micro-AP; arXiv 2106.09672).

    Precision is summed over the steps of recall; pairs of equal score are taken together, so that
    their order does not matter. Positives that are not among the pairs are never recalled.

    Args:
        scores: of the pairs, any shape.
        correct: booleans of the same shape.
        positives: how many correct pairs there are, whether among these or not.

    Raises:
        ValueError: `positives` is less than the number of correct pairs, or than 1.
    """
    found = int(correct.sum())
    if positives < max(1, found):
        raise ValueError(f"positives is {positives}; {found} were found, and 1 is the least")
    ordered, order = scores.flatten().sort(descending=True)
    hits = correct.flatten()[order].double().cumsum(0)
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[:-1] = ordered[:-1] != ordered[1:]
    hits, ranks = hits[ends], ends.nonzero()[:, 0] + 1
    steps = hits.diff(prepend=hits.new_zeros(1))
    return float((hits / ranks * steps).sum() / positives)


def percent(figures: Mapping[int, float | None]) -> dict[str, float | None]:
    """Shares by k as JSON tells them: percent, under the numbers' digits."""
    return {str(k): None if value is None else 100 * value for k, value in figures.items()}


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return float(sum(values) / len(values)) if values else None
