"""Weighted k-NN classification on frozen features (paper, section 4.1; arXiv 1805.01978)."""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.artifact import ArtifactError
from training.config import ConfigError
from training.distributed import World
from training.evaluation.command import (
    Session,
    add_common_options,
    describe_data,
    positive,
    session,
    tell,
)
from training.evaluation.features import Batch, Embed, View, collect, embedder, stream
from training.evaluation.labelled import Labelled, open_train_and_val
from training.evaluation.nearest import Nearest, Neighbours
from training.evaluation.stored import description, stored, storing
from training.precision import autocast_dtype, precision_name
from training.sources import DataError

TEMPERATURE = 0.07
KS = (10, 20, 100, 200)
_CHUNK = 4096  # queries that vote at once

Scores = dict[str, dict[str, float]]
"""By k: {"20": {"top1": .., "top5": ..}}, in percent."""


def classify(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int,
    classes: int,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The classes of each query by falling weight of votes, [queries, classes]; see `vote`.

    Args:
        bank: L2-normalised features [M, D] with `labels` [M].
        queries: L2-normalised features [Q, D].

    Raises:
        ValueError: k is not from 1 to M.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}; the bank holds {len(bank)} pictures, so it must be 1 to that")
    nearest = Nearest(queries, k)
    nearest.add(torch.arange(len(bank)), bank)
    similarity, places = nearest.found()
    return vote(similarity, labels[places], classes=classes, temperature=temperature)


def vote(
    similarity: Tensor, labels: Tensor, *, classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """The classes of each query by falling weight of its neighbours' votes, [Q, classes].

    Each neighbour votes for its class with weight exp(similarity / temperature). Classes of equal
    weight, such as those without a vote, stand in the order of their numbers.

    Args:
        similarity: of each query's neighbours [Q, k], best first.
        labels: their classes [Q, k].
    """
    # Against the best one: the order of the sums is the same, and a small temperature overflows
    # nothing.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = similarity.new_zeros(len(similarity), classes)
    votes.scatter_add_(1, labels, weights)
    return votes.argsort(dim=1, descending=True, stable=True)


def accuracy(ranked: Tensor, truth: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent of `ranked` [Q, classes] against `truth` [Q]."""
    hits = ranked[:, :5] == truth[:, None]
    return {
        "top1": 100.0 * hits[:, 0].double().mean().item(),
        "top5": 100.0 * hits.any(dim=1).double().mean().item(),
    }


def neighbours(
    queries: Mapping[str, Tensor], bank: Iterable[Batch], *, k: int, here: World
) -> dict[str, Neighbours]:
    """The k nearest by cosine of each query [Q, D], for each descriptor, on every process.

    Args:
        queries: all of them, on every process.
        bank: this process's share; it streams past.

    Raises:
        ArtifactError: vectors that are not finite.
        ValueError: the bank holds fewer than k pictures.
    """
    nearest = {
        name: Nearest(_unit(name, vectors).to(here.device), k) for name, vectors in queries.items()
    }
    for places, found in bank:
        for name, each in nearest.items():
            each.add(places, _unit(name, found[name]))
    return {name: each.found_by_all(here) for name, each in nearest.items()}


def scores(
    found: Neighbours,
    labels: Tensor,
    truth: Tensor,
    *,
    ks: Sequence[int],
    classes: int,
    temperature: float = TEMPERATURE,
) -> Scores:
    """Top-1 and top-5 for each k of `ks`, none above the neighbours that were found.

    Args:
        labels: of the bank [M].
        truth: of the queries [Q].
    """
    similarity, places = found.cpu()
    voters = labels[places]
    results = {}
    for k in ks:
        ranked = [
            vote(part, theirs, classes=classes, temperature=temperature)[:, :5]
            for part, theirs in zip(
                torch.split(similarity[:, :k], _CHUNK),
                torch.split(voters[:, :k], _CHUNK),
                strict=True,
            )
        ]
        results[str(k)] = accuracy(torch.cat(ranked), truth)
    return results


def evaluate(
    train: Labelled,
    val: Labelled,
    view: View,
    embed: Embed,
    *,
    ks: Sequence[int],
    here: World,
    temperature: float = TEMPERATURE,
    batch_size: int = 256,
    workers: int = 0,
) -> dict[str, Scores]:
    """k-NN of `val` against the bank `train`: {"cls": {"20": {"top1": .., "top5": ..}}}.

    Raises:
        DataError: a picture that cannot be read.
        ArtifactError: vectors that are not finite.
    """
    read = partial(
        stream, view=view, embed=embed, here=here, batch_size=batch_size, workers=workers
    )
    return compare(
        read(val.pictures, title="val"),
        read(train.pictures, title="train"),
        train,
        val,
        ks=ks,
        here=here,
        temperature=temperature,
    )


def compare(
    queries: Iterable[Batch],
    bank: Iterable[Batch],
    train: Labelled,
    val: Labelled,
    *,
    ks: Sequence[int],
    here: World,
    temperature: float = TEMPERATURE,
) -> dict[str, Scores]:
    """As `evaluate`, of vectors that are there: this process's shares of both, streaming past.

    Raises:
        ArtifactError: vectors that are not finite.
    """
    found = neighbours(collect(queries, here), bank, k=max(ks), here=here)
    return {
        name: scores(
            each,
            train.labels,
            val.labels,
            ks=ks,
            classes=len(train.classes),
            temperature=temperature,
        )
        for name, each in found.items()
    }


def _unit(name: str, vectors: Tensor) -> Tensor:
    if not bool(vectors.isfinite().all()):
        raise ArtifactError(
            f"descriptor {name!r} of the model has values that are not finite; fp16 may be too "
            "narrow for it (--precision)"
        )
    return F.normalize(vectors, dim=1)


def add_command(names: Any) -> None:
    """Adds `knn` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser("knn", help=__doc__, description=__doc__)
    add_common_options(parser)
    parser.add_argument("--train", required=True, nargs="+", help="the bank: class folders or tars")
    parser.add_argument("--val", required=True, nargs="+", help="the queries, likewise")
    parser.add_argument(
        "--k",
        type=positive,
        nargs="+",
        help="neighbours that vote (default: those of 10, 20, 100 and 200 that --train has)",
    )
    parser.add_argument(
        "--temperature", type=_temperature, default=TEMPERATURE, help="of votes (%(default)s)"
    )
    parser.add_argument(
        "--descriptors",
        nargs="+",
        default=["cls"],
        help="compared in one run: cls, mean, cls+mean, copy, lastN, block-N; the first is 'knn'",
    )
    features = parser.add_mutually_exclusive_group()
    features.add_argument("--save-features", type=Path, metavar="DIR", help="keep the vectors here")
    features.add_argument(
        "--load-features", type=Path, metavar="DIR", help="use those that were saved"
    )
    parser.set_defaults(run=_run)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def _run(options: argparse.Namespace) -> None:
    with session(options) as own:
        train, val = open_train_and_val(options.train, options.val)
        ks = _neighbour_counts(options.k, len(train.labels))
        queries, bank = _vectors(options, own, {"val": val, "train": train})
        results = compare(
            queries,
            bank,
            train,
            val,
            ks=ks,
            here=own.here,
            temperature=options.temperature,
        )
        tell(
            options,
            own,
            name="knn",
            figures={"knn": results[options.descriptors[0]], "descriptors": results},
            protocol={
                "k": ks,
                "temperature": options.temperature,
                "descriptors": list(results),
            },
            data={
                "train": describe_data(options.train, train.pictures),
                "val": describe_data(options.val, val.pictures),
                "features": options.load_features and str(options.load_features),
            },
            table=_table(results, own, train, val),
        )


def _neighbour_counts(asked: list[int] | None, pictures: int) -> list[int]:
    if asked is None:
        return [k for k in KS if k <= pictures] or [pictures]
    if too_many := [k for k in asked if k > pictures]:
        raise DataError(
            f"--k {too_many[0]}: --train holds {pictures} pictures; k must be 1 to that"
        )
    return asked


def _vectors(
    options: argparse.Namespace, own: Session, parts: Mapping[str, Labelled]
) -> list[Iterable[Batch]]:
    """This process's share of each part's vectors: computed, computed and stored, or stored."""
    descriptors = list(dict.fromkeys(options.descriptors))
    here = own.here
    precision = precision_name(autocast_dtype(own.precision, here.device))
    described = {name: description(own.model, precision, part) for name, part in parts.items()}
    if (folder := options.load_features) is not None:
        return [
            stored(folder, name, descriptors, described=described[name], here=here)
            for name in parts
        ]
    try:
        embed = embedder(
            own.artifact, here.device, precision=own.precision, descriptors=descriptors
        )
    except ValueError as error:
        raise ConfigError(f"--descriptors, model {own.model.name!r}: {error}") from error
    computed = {
        name: stream(
            part.pictures,
            own.artifact.preprocess.centre_crop,
            embed,
            here=here,
            batch_size=own.batch_size,
            workers=own.workers,
            title=name,
        )
        for name, part in parts.items()
    }
    if (folder := options.save_features) is None:
        return list(computed.values())
    return [
        storing(
            batches, folder, name, labels=parts[name].labels, described=described[name], here=here
        )
        for name, batches in computed.items()
    ]


def _table(results: Mapping[str, Scores], own: Session, train: Labelled, val: Labelled) -> str:
    lines = [
        f"k-NN of {len(val.labels)} pictures against {len(train.labels)}, model {own.model.name}"
    ]
    wide = max(map(len, results))
    for name, by_k in results.items():
        for k, result in by_k.items():
            lines.append(
                f"  {name:{wide}}  k = {k:>4}: top-1 {result['top1']:5.2f} %, "
                f"top-5 {result['top5']:5.2f} %"
            )
    return "\n".join(lines)
