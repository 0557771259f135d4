"""Searches a database for the originals of copies, and tells how well that went."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.distributed import World
from training.evaluation.features import Embed, View, extract, stream
from training.evaluation.nearest import Nearest, Neighbours
from training.evaluation.ranking import average_precision, mean, micro_average_precision
from training.sources import Pictures

KEPT = 20
"""Neighbours that are looked at, as in the original."""

STRANGER = -1
"""The group of a picture that is no copy, and of which there is none."""

Variant = Callable[[Tensor], Tensor]
"""Vectors [B, D] -> L2-normalised [B, D]: with a whitening, or without."""


class CopyBenchmark(NamedTuple):
    """Copies, and the pictures among which their originals are to be found.

    Attributes:
        queries: the copies.
        query_groups: [Q], equal for a copy and its originals, or `STRANGER`.
        blocks: name -> the places of its queries.
        database: originals and distractors.
        database_groups: [N], likewise.
    """

    queries: Pictures
    query_groups: Tensor
    blocks: Mapping[str, range]
    database: Pictures
    database_groups: Tensor


class Settings(NamedTuple):
    """How pictures become vectors: see `training.evaluation.features`."""

    view: View
    embed: Embed
    here: World
    batch_size: int
    workers: int


def search(
    benchmark: CopyBenchmark,
    settings: Settings,
    variants: Mapping[str, Variant],
    *,
    descriptor: str,
    kept: int = KEPT,
) -> dict[str, Neighbours]:
    """The neighbours of every query by each variant, from one pass over queries and database.

    Held are the queries' vectors [Q, D] and their k best; the database is streamed.

    Raises:
        DataError: a picture that cannot be read.
    """
    view, embed, here, batch_size, workers = settings
    vectors = extract(
        benchmark.queries,
        view,
        embed,
        here=here,
        batch_size=batch_size,
        workers=workers,
        title="copies",
    )[descriptor].to(here.device)
    queries = {name: variant(vectors) for name, variant in variants.items()}
    k = min(kept, len(benchmark.database.names))
    best = {name: Nearest(each, k) for name, each in queries.items()}
    for places, found in stream(
        benchmark.database,
        view,
        embed,
        here=here,
        batch_size=batch_size,
        workers=workers,
        title="database",
    ):
        for name, variant in variants.items():
            best[name].add(places, variant(found[descriptor]))
    return {name: each.found_by_all(here).cpu() for name, each in best.items()}


def copy_figures(benchmark: CopyBenchmark, neighbours: Neighbours) -> dict[str, Any]:
    """What the neighbours are worth, in percent.

    {"micro_ap": .., "blocks": {NAME: {"queries", "map", "recall_at_1", "micro_ap"}}}

    mAP (by trapezoids) and recall@1 are means over the queries that have an original; in micro-AP
    the others' neighbours count as false alarms. None where no query of a block has an original.
    """
    groups = benchmark.query_groups
    correct = _correct(groups, benchmark.database_groups[neighbours.places])
    sizes = benchmark.database_groups[benchmark.database_groups != STRANGER].bincount(
        minlength=int(groups.max()) + 1 if len(groups) else 0
    )
    positives = torch.where(groups == STRANGER, 0, sizes[groups.clamp(min=0)])

    def figures(rows: range) -> dict[str, float | None]:
        wanted = [i for i in rows if positives[i] > 0]
        total = int(positives[rows.start : rows.stop].sum())
        pairs = slice(rows.start, rows.stop)
        aps = [
            average_precision(correct[i].nonzero()[:, 0].tolist(), int(positives[i]))
            for i in wanted
        ]
        return {
            "map": _percent(mean(aps)),
            "recall_at_1": _percent(mean([float(correct[i, 0]) for i in wanted])),
            "micro_ap": _percent(
                micro_average_precision(neighbours.similarity[pairs], correct[pairs], total)
                if total
                else None
            ),
        }

    return {
        "micro_ap": figures(range(len(groups)))["micro_ap"],
        "blocks": {
            name: {"queries": len(rows), **figures(rows)} for name, rows in benchmark.blocks.items()
        },
    }


def _correct(query_groups: Tensor, found_groups: Tensor) -> Tensor:
    known = query_groups != STRANGER
    return (found_groups == query_groups[:, None]) & known[:, None]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
