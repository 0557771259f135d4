"""A linear classifier on frozen features (paper, section 4.1 and appendix F.2).

Several learning rates are trained side by side in one pass over the pictures.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from backbone.architectures import Architecture
from backbone.artifact import Artifact
from backbone.classifier import Classifier, descriptor_length, write_classifier
from training.config import ConfigError
from training.evaluation.command import (
    Session,
    add_common_options,
    describe_data,
    positive,
    session,
    tell,
    whole,
)
from training.evaluation.features import embedder
from training.evaluation.labelled import open_train_and_val
from training.evaluation.linear_features import Frozen
from training.evaluation.linear_probes import LinearProbes
from training.evaluation.linear_run import LinearRun, fit
from training.precision import autocast_dtype, precision_name
from training.tables import require

PAPER_LR = 0.001
RATES = (PAPER_LR, 0.003, 0.01, 0.03, 0.1, 0.3)
CLASSIFIER = "classifier.safetensors"


def default_descriptor(architecture: Architecture) -> str:
    """The feature form that the paper gives each size of network.

    Small ViTs: the CLS of the last 4 blocks; larger ones: the last CLS and the mean of the patch
    tokens; convolutional networks: what they pool.
    """
    if not architecture.has_attention:
        return "cls"
    return "last4" if architecture.name in ("vit_tiny", "vit_small") else "cls+mean"


def classifier_of(
    probes: LinearProbes, place: int, classes: list[str], artifact: Artifact, **header: Any
) -> Classifier:
    """The probe at `place` among the rates, as a classifier that can be written.

    Raises:
        ConfigError: it has diverged.
    """
    weight, bias = probes.weight[place].T.contiguous().cpu(), probes.bias[place].cpu()
    if not bool(weight.isfinite().all() and bias.isfinite().all()):
        raise ConfigError("--lr: every rate has diverged; take lower ones")
    return Classifier(
        weight=weight,
        bias=bias,
        classes=tuple(classes),
        fingerprint=artifact.fingerprint,
        preprocess=artifact.preprocess,
        **header,
    )


def add_command(names: Any) -> None:
    """Adds `linear` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser("linear", help=__doc__, description=__doc__)
    add_common_options(parser, batch_size=128)
    parser.add_argument("--train", required=True, nargs="+", help="class folders or tars")
    parser.add_argument("--val", required=True, nargs="+", help="likewise")
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=list(RATES),
        metavar="BASE",
        help="for 256 pictures a step, each trained beside the others (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=positive, default=100)
    parser.add_argument(
        "--descriptor",
        help="cls, cls+mean, lastN, ... (default: last4 for small ViTs, cls+mean for larger ones, "
        "cls for convolutional networks)",
    )
    parser.add_argument(
        "--augment",
        choices=["crop", "none"],
        default="crop",
        help="crop: random crops and flips, the paper's; none: centre crops, embedded once",
    )
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="snapshots to go on from, and the best classifier"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    for base in options.lr:
        require(math.isfinite(base) and base > 0, "--lr", base, "must be above 0 and finite")
    require(len(set(options.lr)) == len(options.lr), "--lr", options.lr, "must differ")
    require(options.seed < 2**32, "--seed", options.seed, "must be from 0 to 2**32 - 1")
    with session(options) as own:
        artifact, here = own.artifact, own.here
        train, val = open_train_and_val(options.train, options.val)
        descriptor = options.descriptor or default_descriptor(artifact.architecture)
        frozen = _frozen(own, descriptor)
        data = {
            "train": describe_data(options.train, train.pictures),
            "val": describe_data(options.val, val.pictures),
        }
        settings = {
            "--augment": options.augment,
            "--batch-size x processes": own.batch_size * here.size,
            "--descriptor": descriptor,
            "--epochs": options.epochs,
            "--lr": options.lr,
            "--model": artifact.fingerprint,
            "--precision": precision_name(autocast_dtype(own.precision, here.device)),
            "--seed": options.seed,
            **{f"--{part} (hash of names)": each["names_sha256"] for part, each in data.items()},
        }
        run = LinearRun(options.out, settings, here)
        probes = fit(
            train,
            val,
            frozen,
            run,
            bases=options.lr,
            epochs=options.epochs,
            augment=options.augment == "crop",
            seed=options.seed,
            here=here,
        )
        results = run.results()
        best = max(results, key=lambda rate: results[rate]["top1"])  # the first of equal ones
        if options.out is not None and here.is_main:
            classifier = classifier_of(
                probes,
                list(results).index(best),
                train.classes,
                artifact,
                descriptor=descriptor,
                base_lr=float(best),
                top1=results[best]["top1"],
            )
            _save(classifier, options.out / CLASSIFIER)
        tell(
            options,
            own,
            name="linear",
            figures={
                "linear": results,
                "best": {"lr": float(best), **results[best]},
                "curve": run.curve,
            },
            protocol=_protocol(options, settings),
            data=data,
            table=_table(own, options, settings, results, best, len(val.labels)),
        )


def _frozen(own: Session, descriptor: str) -> Frozen:
    artifact = own.artifact
    try:
        length = descriptor_length(artifact.architecture, descriptor)
    except ValueError as error:
        raise ConfigError(f"--descriptor: {error}") from error
    return Frozen(
        preprocess=artifact.preprocess,
        embed=embedder(
            artifact, own.here.device, precision=own.precision, descriptors=[descriptor]
        ),
        descriptor=descriptor,
        length=length,
        batch_size=own.batch_size,
        workers=own.workers,
    )


def _save(classifier: Classifier, path: Path) -> None:
    try:
        write_classifier(classifier, path)
    except OSError as error:
        raise ConfigError(f"--out: {str(path)!r} cannot be written: {error.strerror}") from error
    print(f"the best classifier is in {path}", file=sys.stderr)


def _protocol(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Every setting that the figures depend on, and the fixed parts of the recipe."""
    random = "random resized crop of 8 to 100%, bilinear, and flip"
    return {
        "descriptor": settings["--descriptor"],
        "base_lrs": options.lr,
        "lr": "base x batch / 256, cosine to 0, moved once an epoch",
        "batch": settings["--batch-size x processes"],
        "epochs": options.epochs,
        "optimizer": "SGD, momentum 0.9, weight decay 0",
        "augment": options.augment,
        "train_view": random if options.augment == "crop" else "centre crop",
        "val_view": "centre crop",
        "arithmetic": settings["--precision"],
        "seed": options.seed,
    }


def _table(
    own: Session,
    options: argparse.Namespace,
    settings: dict[str, Any],
    results: dict[str, dict[str, float]],
    best: str,
    count: int,
) -> str:
    augmented = "random crops" if options.augment == "crop" else "centre crops (not the paper's)"
    lines = [
        f"linear classifier on {settings['--descriptor']}, model {own.model.name}: "
        f"{options.epochs} epochs of {augmented}, {count} pictures asked"
    ]
    for rate, found in results.items():
        marks = [*["best"] * (rate == best), *["the paper's"] * (float(rate) == PAPER_LR)]
        lines.append(
            f"  base rate {rate:>7}: top-1 {found['top1']:5.2f} %, top-5 {found['top5']:5.2f} %"
            f"{'  <- ' if marks else ''}{', '.join(marks)}"
        )
    return "\n".join(lines)
