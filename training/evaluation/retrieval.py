"""Image retrieval: landmarks of revisited Oxford and Paris (paper, section 4.2), or any classes."""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.artifact import Artifact
from backbone.descriptors import multiscale
from training.config import ConfigError
from training.distributed import World, all_reduce_sum, gather_rows
from training.evaluation.command import (
    Session,
    add_common_options,
    describe_data,
    positive,
    session,
    tell,
)
from training.evaluation.features import Embed, View, embedder, extract, share, stream
from training.evaluation.labelled import check_class_sizes, class_indices
from training.evaluation.landmarks import DATASETS, DIFFICULTIES, Landmarks, open_landmarks
from training.evaluation.ranking import KAPPAS, RankedFigures, percent, ranked_figures
from training.precision import autocast, autocast_dtype
from training.sources import Pictures, class_labels, open_pictures

IMAGE_SIZE = 224
_ENTRIES = 2**24  # similarities that are sorted at once: 200 MB with their order


def long_side_view(artifact: Artifact, *, long_side: int, smallest: int) -> View:
    """The landmarks' view: the picture in its own aspect ratio, its long side `long_side` pixels.

    As in the original: Pillow's thumbnail by Lanczos, so that a smaller picture stays as it is.
    What is then less than `smallest` on a side, which the network could not take, is enlarged.
    """

    def view(picture: Image.Image) -> Tensor:
        picture = picture.copy()
        picture.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
        size = max(smallest, picture.width), max(smallest, picture.height)
        return artifact.preprocess.to_tensor(
            picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
        )

    return view


def multiscale_embedder(artifact: Artifact, device: torch.device, *, precision: str) -> Embed:
    """Batches of views -> CLS over three scales; see `backbone.descriptors.multiscale`."""
    network, dtype = artifact.network().to(device), autocast_dtype(precision, device)

    def embed(batch: Tensor) -> dict[str, Tensor]:
        with autocast(device, dtype):
            return {"cls": multiscale(network, batch).float()}

    return embed


def rank_landmarks(
    data: Landmarks, view: View, embed: Embed, *, here: World, boxes: bool = True, workers: int = 2
) -> dict[str, RankedFigures]:
    """Figures by difficulty ("easy", "medium", "hard"), equal on every process.

    Pictures go one at a time, as they differ in size. Held are the queries' vectors and the
    similarities [Q, N] in float32 with their order: 0.9 GB for 70 queries in a million pictures.

    Args:
        embed: gives "cls".
        boxes: whether queries are cut to their boxes, as the data sets' protocol has it.

    Raises:
        DataError: a picture that cannot be read, or a box outside of its picture.
    """
    queries = data.cropped_queries() if boxes else data.queries
    title = f"{data.name} queries"
    vectors = extract(queries, view, embed, here=here, batch_size=1, workers=workers, title=title)
    wanted = F.normalize(vectors["cls"], dim=1).to(here.device)
    rows = [torch.empty(0, len(wanted))]
    for _, found in stream(
        data.database, view, embed, here=here, batch_size=1, workers=workers, title=data.name
    ):
        rows.append((F.normalize(found["cls"], dim=1) @ wanted.T).cpu())
    similarity = gather_rows(torch.cat(rows), here)
    ranks = similarity.argsort(dim=0, descending=True, stable=True).numpy()
    return {
        difficulty: ranked_figures(ranks, [query.relevant(difficulty) for query in data.truth])
        for difficulty in DIFFICULTIES
    }


def leave_one_out(
    vectors: Tensor, labels: Tensor, *, here: World, kappas: Sequence[int] = KAPPAS
) -> tuple[float, dict[int, float]]:
    """Each picture searches all others: mAP, and recall@k, shares of 1, equal on every process.

    A query's average precision is the mean of the precision at each picture of its class (no
    trapezoids here: this is how metric learning counts); recall@k is the share of queries with one
    of their class among the first k. Queries go in chunks; N x N similarities are never there.

    Args:
        vectors: L2-normalised [N, D].
        labels: [N]; each at least twice.

    Raises:
        ValueError: a label that stands alone.
    """
    alone = labels.bincount() == 1
    if alone.any():
        raise ValueError(f"label {int(alone.nonzero()[0])} has one picture; each needs two")
    count = len(vectors)
    vectors, labels = vectors.to(here.device), labels.to(here.device)
    ranks = torch.arange(1, count + 1, device=here.device)
    precision = torch.zeros((), dtype=torch.float64, device=here.device)
    recalled = torch.zeros(len(kappas), dtype=torch.float64, device=here.device)
    own = share(count, here)
    chunks = torch.split(torch.arange(own.start, own.stop), max(1, _ENTRIES // count))
    for chunk in (each.to(here.device) for each in chunks):
        similarity = vectors[chunk] @ vectors.T
        # A query comes last in its own list, and is no hit there.
        similarity.scatter_(1, chunk[:, None], -torch.inf)
        order = similarity.argsort(dim=1, descending=True, stable=True)
        hits = labels[order] == labels[chunk, None]
        hits[:, -1] = False
        right = hits.cumsum(dim=1)
        aps = (right / ranks * hits).sum(dim=1, dtype=torch.float64) / right[:, -1]
        precision += aps.sum()
        recalled += torch.stack([hits[:, :k].any(dim=1).double().sum() for k in kappas])
    precision, recalled = all_reduce_sum(precision), all_reduce_sum(recalled)
    return (
        float(precision) / count,
        {k: float(r) / count for k, r in zip(kappas, recalled, strict=True)},
    )


def add_command(names: Any) -> None:
    """Adds `retrieval` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "retrieval", help=__doc__, description=__doc__
    )
    add_common_options(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="a folder that holds roxford5k/, rparis6k/ or both")
    data.add_argument("--labels", nargs="+", help="class folders or tars: each searches the others")
    parser.add_argument("--dataset", choices=DATASETS, help="one of those in --data")
    parser.add_argument(
        "--image-size",
        type=positive,
        help=f"long side in pixels, of --data (default: {IMAGE_SIZE})",
    )
    parser.add_argument("--multiscale", action="store_true", help="CLS over 3 scales, of --data")
    parser.add_argument("--no-boxes", action="store_true", help="whole queries, as the original")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    with session(options) as own:
        if options.labels:
            _run_labels(options, own)
        else:
            _run_landmarks(options, own)


def _run_landmarks(options: argparse.Namespace, own: Session) -> None:
    architecture, device = own.artifact.architecture, own.here.device
    smallest = architecture.smallest_side * (2 if options.multiscale else 1)
    long_side = options.image_size or IMAGE_SIZE
    if long_side < smallest:
        raise ConfigError(f"--image-size {long_side}: the model needs {smallest} pixels")
    found = open_landmarks(options.data, options.dataset)
    view = long_side_view(own.artifact, long_side=long_side, smallest=smallest)
    make = multiscale_embedder if options.multiscale else embedder
    embed = make(own.artifact, device, precision=own.precision)
    boxes = not options.no_boxes
    results = {
        data.name: rank_landmarks(
            data, view, embed, here=own.here, boxes=boxes, workers=own.workers
        )
        for data in found
    }
    lines = [f"retrieval by CLS{' over 3 scales' if options.multiscale else ''}, model "
             f"{own.model.name}; %"]  # fmt: skip
    lines.append(f"  {'':<18}   mAP   " + "  ".join(f"{f'mP@{k}':>5}" for k in KAPPAS))
    for name, figures in results.items():
        for difficulty, each in figures.items():
            shown = [each.map, *each.mp_at_as_published.values()]
            lines.append(f"  {name:<10} {difficulty:<7} " + "  ".join(map(_cell, shown)))
    tell(
        options,
        own,
        name="retrieval",
        figures={"retrieval": {name: _in_percent(each) for name, each in results.items()}},
        protocol={
            "image_size": long_side,
            "multiscale": options.multiscale,
            "boxes": boxes,
            "descriptor": "cls",
            "average_precision": "trapezoids",
        },
        data={
            data.name: {
                "database": describe_data([options.data], data.database),
                "queries": describe_data([options.data], data.queries),
            }
            for data in found
        },
        table="\n".join(lines),
    )


def _run_labels(options: argparse.Namespace, own: Session) -> None:
    if options.dataset or options.image_size or options.multiscale or options.no_boxes:
        raise ConfigError(
            "--dataset, --image-size, --multiscale and --no-boxes belong to --data, not --labels"
        )
    pictures, labels = _open_labels(options.labels)
    features = partial(extract, here=own.here, batch_size=own.batch_size, workers=own.workers)
    embed = embedder(own.artifact, own.here.device, precision=own.precision)
    vectors = features(pictures, own.artifact.preprocess.centre_crop, embed)["cls"]
    value, recall = leave_one_out(F.normalize(vectors, dim=1), labels, here=own.here)
    told = ", ".join(f"recall@{k} {100 * share:.2f} %" for k, share in recall.items())
    tell(
        options,
        own,
        name="retrieval",
        figures={"retrieval": {"labels": {"map": 100 * value, "recall_at": percent(recall)}}},
        protocol={"descriptor": "cls", "average_precision": "mean of precisions"},
        data=describe_data(options.labels, pictures),
        table=f"retrieval, each of {len(labels)} pictures among the others, model "
        f"{own.model.name}\n  mAP {100 * value:.2f} %, {told}",
    )


def _open_labels(paths: Sequence[str]) -> tuple[Pictures, Tensor]:
    """Raises a `DataError` for pictures outside of class folders, and classes of one picture."""
    pictures = open_pictures(paths)
    names = class_labels(pictures, where="--labels")
    check_class_sizes(pictures, names, least=2, where="--labels")
    return pictures, class_indices(names)[1][0]


def _in_percent(figures: Mapping[str, RankedFigures]) -> dict[str, Any]:
    return {
        difficulty: {
            "map": None if each.map is None else 100 * each.map,
            "mp_at": percent(each.mp_at),
            "mp_at_as_published": percent(each.mp_at_as_published),
            "aps": [None if ap is None else 100 * ap for ap in each.aps],
        }
        for difficulty, each in figures.items()
    }


def _cell(value: float | None) -> str:
    return "    -" if value is None else f"{100 * value:5.1f}"
