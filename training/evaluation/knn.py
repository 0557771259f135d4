"""Weighted k-NN classification on frozen features (paper, section 4.1; arXiv 1805.01978)."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.pretrained import load_model
from training.distributed import choose_device
from training.evaluation.features import class_indices, embedder, extract
from training.sources import DataError, Pictures, class_labels, open_pictures

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
    train: Pictures,
    val: Pictures,
    view: Callable[[Image.Image], Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    ks: Sequence[int],
    device: torch.device,
    temperature: float = TEMPERATURE,
    workers: int = 2,
) -> dict[str, dict[str, float]]:
    """k-NN of `val` against the bank `train`; {"20": {"top1": .., "top5": ..}} for each k.

    Raises:
        DataError: pictures outside class folders, or classes in `val` that `train` lacks.
    """
    classes, (bank_labels, truth) = class_indices(
        class_labels(train, where="--train"), class_labels(val, where="--val")
    )
    present = set(bank_labels.tolist())
    if absent := [classes[i] for i in sorted(set(truth.tolist()) - present)]:
        raise DataError(f"--val has {len(absent)} classes that --train lacks, e.g. {absent[:3]}")
    features = partial(extract, view=view, embed=embed, device=device, workers=workers)
    queries = F.normalize(features(val, title="val"), dim=1)
    bank = F.normalize(features(train, title="train"), dim=1)
    results = {}
    for k in ks:
        ranked = classify(
            bank, bank_labels, queries, k=k, classes=len(classes), temperature=temperature
        )
        results[str(k)] = accuracy(ranked, truth)
    return results


def add_command(names: Any) -> None:
    """Adds `knn` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser("knn", help=__doc__, description=__doc__)
    parser.add_argument("--model", required=True, help="default, a known name, or a path")
    parser.add_argument("--train", required=True, nargs="+", help="the bank: class folders or tars")
    parser.add_argument("--val", required=True, nargs="+", help="the queries, likewise")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    device = choose_device(options.device)
    model = load_model(options.model)
    train, val = open_pictures(options.train), open_pictures(options.val)
    too_many = [k for k in options.k if not 1 <= k <= len(train.names)]
    if too_many:
        raise DataError(f"--k {too_many[0]}: --train holds {len(train.names)} pictures")
    results = evaluate(
        train,
        val,
        model.artifact.preprocess.centre_crop,
        embedder(model.artifact, device),
        ks=options.k,
        device=device,
        temperature=options.temperature,
        workers=options.workers,
    )
    if options.json:
        print(
            json.dumps(
                {
                    "model": model.name,
                    "fingerprint": model.artifact.fingerprint,
                    "train": len(train.names),
                    "val": len(val.names),
                    "knn": results,
                }
            )
        )
        return
    print(f"k-NN of {len(val.names)} pictures against {len(train.names)}, model {model.name}")
    for k, result in results.items():
        print(f"  k = {k:>4}: top-1 {result['top1']:5.2f} %, top-5 {result['top5']:5.2f} %")
    sys.stdout.flush()
