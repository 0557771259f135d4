"""Weighted k-NN classification on frozen features (paper, section 4.1; arXiv 1805.01978)."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distributed import World
from training.evaluation.command import (
    add_common_options,
    describe_data,
    positive,
    session,
    tell,
)
from training.evaluation.features import Embed, View, embedder, extract
from training.evaluation.labelled import Labelled, open_train_and_val
from training.sources import DataError

TEMPERATURE = 0.07
_CHUNK = 512


def classify(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int,
    classes: int,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The classes of each query by falling weight of votes, [queries, classes].

    Each of the k nearest neighbours votes for its class with weight exp(cosine / temperature).
    Queries go in chunks, so that the matrix of similarities stays small.

    Args:
        bank: L2-normalised features [M, D] with `labels` [M].
        queries: L2-normalised features [Q, D].

    Raises:
        ValueError: k is not from 1 to M.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}; the bank holds {len(bank)} pictures, so it must be 1 to that")
    ranked = []
    for chunk in torch.split(queries, _CHUNK):
        similarity, neighbours = (chunk @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), classes, dtype=bank.dtype, device=bank.device)
        votes.scatter_add_(1, labels[neighbours], (similarity / temperature).exp())
        ranked.append(votes.argsort(dim=1, descending=True))
    return torch.cat(ranked)


def accuracy(ranked: Tensor, truth: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent of `ranked` [Q, classes] against `truth` [Q]."""
    hits = ranked[:, :5] == truth[:, None]
    return {
        "top1": 100.0 * hits[:, 0].double().mean().item(),
        "top5": 100.0 * hits.any(dim=1).double().mean().item(),
    }


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
    workers: int = 2,
) -> dict[str, dict[str, dict[str, float]]]:
    """k-NN of `val` against the bank `train`: {"cls": {"20": {"top1": .., "top5": ..}}}.

    Raises:
        DataError: a picture that cannot be read.
    """
    features = partial(
        extract, view=view, embed=embed, here=here, batch_size=batch_size, workers=workers
    )
    queries, bank = features(val.pictures, title="val"), features(train.pictures, title="train")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, found in queries.items():
        normalised = F.normalize(found, dim=1), F.normalize(bank[name], dim=1)
        results[name] = {}
        for k in ks:
            ranked = classify(
                normalised[1],
                train.labels,
                normalised[0],
                k=k,
                classes=len(train.classes),
                temperature=temperature,
            )
            results[name][str(k)] = accuracy(ranked, val.labels)
    return results


def add_command(names: Any) -> None:
    """Adds `knn` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser("knn", help=__doc__, description=__doc__)
    add_common_options(parser)
    parser.add_argument("--train", required=True, nargs="+", help="the bank: class folders or tars")
    parser.add_argument("--val", required=True, nargs="+", help="the queries, likewise")
    parser.add_argument("--k", type=positive, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    with session(options) as own:
        train, val = open_train_and_val(options.train, options.val)
        if too_many := [k for k in options.k if k > len(train.labels)]:
            raise DataError(f"--k {too_many[0]}: --train holds {len(train.labels)} pictures")
        results = evaluate(
            train,
            val,
            own.artifact.preprocess.centre_crop,
            embedder(own.artifact, own.here.device, precision=own.precision),
            ks=options.k,
            here=own.here,
            temperature=options.temperature,
            batch_size=own.batch_size,
            workers=own.workers,
        )["cls"]
        lines = [f"k-NN of {len(val.labels)} pictures against {len(train.labels)}, model "
                 f"{own.model.name}"]  # fmt: skip
        for k, result in results.items():
            lines.append(
                f"  k = {k:>4}: top-1 {result['top1']:5.2f} %, top-5 {result['top5']:5.2f} %"
            )
        tell(
            options,
            own,
            name="knn",
            figures={"knn": results},
            protocol={"k": options.k, "temperature": options.temperature},
            data={
                "train": describe_data(options.train, train.pictures),
                "val": describe_data(options.val, val.pictures),
            },
            table="\n".join(lines),
        )
