"""Supervised transfer (paper, Table 6): fine-tunes on class folders by DeiT's protocol."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from backbone.artifact import Artifact
from backbone.preprocess import Preprocess
from training.evaluation.command import (
    Session,
    add_common_options,
    describe_data,
    positive,
    session,
    tell,
    whole,
)
from training.evaluation.finetune_loop import Row, fit, line
from training.evaluation.finetune_network import BACKBONE, HEAD, make_classifier, publish
from training.evaluation.finetune_protocol import LR_BATCH, Protocol
from training.evaluation.labelled import Labelled, open_train_and_val
from training.precision import autocast_dtype
from training.tables import ConfigError

RESUME = "resume"
"""Below --out: the snapshots, apart from what is published, and not taken for a pretraining's."""


def add_command(names: Any) -> None:
    """Adds `finetune` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "finetune",
        help=__doc__,
        description=f"{__doc__} The same command again goes on from the last snapshot in --out.",
    )
    add_common_options(parser, batch_size=64)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("--train", required=True, nargs="+", help="to learn from: class folders or tars")
    add("--val", required=True, nargs="+", help="to test on, likewise")
    add("--out", required=True, type=Path, help="folder for snapshots and the fine-tuned network")
    add("--from-scratch", action="store_true", help="random weights in the place of the model's")
    add("--image-size", type=positive, help="pixels; default: the model's own crop")
    add("--epochs", type=positive, default=100, help="DeiT: 300; default: %(default)s")
    add("--warmup-epochs", type=float, help="default: 5, at most a tenth of --epochs")
    rule = f"x --batch-size x processes / {LR_BATCH}; default: %(default)s"
    add("--init-lr", type=float, default=5e-4, help=f"highest learning rate, {rule}")
    add("--min-lr", type=float, default=1e-5, help=f"learning rate at the end, {rule}")
    add("--weight-decay", type=float, default=0.05)
    add("--layer-decay", type=float, help="default: 0.75 for a ViT, 1 (off) for a convnet")
    add("--drop-path", type=float, default=0.1)
    add("--label-smoothing", type=float, default=0.1)
    add("--mixup", type=float, default=0.8, help="alpha; 0 is off")
    add("--cutmix", type=float, default=1.0, help="alpha; 0 is off")
    add("--erasing", type=float, default=0.25, help="probability of random erasing")
    add("--auto-augment", default="rand-m9-mstd0.5-inc1", help="timm's policy, or none")
    add("--min-scale", type=float, default=0.08, help="least share of a picture in a crop")
    add("--clip-grad", type=float, default=0.0, help="greatest norm of the gradient; 0 is off")
    add("--seed", type=whole, default=0)
    add("--snapshot-steps", type=whole, default=0, help="0: a snapshot after each epoch")


def _run(options: argparse.Namespace) -> None:
    with session(options) as own:
        here, artifact = own.here, own.artifact
        if own.precision == "fp16":
            raise ConfigError("--precision fp16: gradients vanish in it; take bf16, or fp32")
        dtype = autocast_dtype(own.precision, here.device)
        protocol = _protocol(options, own)
        preprocess = _at_size(artifact.preprocess, protocol.image_size)
        train, val = open_train_and_val(options.train, options.val)
        _make_folder(options.out)
        classifier = make_classifier(
            artifact,
            len(train.classes),
            drop_path=protocol.drop_path,
            seed=protocol.seed,
            from_scratch=protocol.from_scratch,
            here=here,
        )
        fitted = fit(
            classifier,
            train,
            val,
            protocol=protocol,
            preprocess=preprocess,
            here=here,
            dtype=dtype,
            workers=own.workers,
            run_dir=options.out / RESUME,
            model=artifact.fingerprint,
            snapshot_steps=options.snapshot_steps,
        )
        if fitted.status:
            raise SystemExit(fitted.status)
        figures = summary(fitted.curve)
        if here.is_main:
            described = _describe(own, protocol, preprocess, train, figures)
            try:
                figures["fingerprint_finetuned"] = publish(
                    classifier,
                    described,
                    train.classes,
                    options.out,
                    base_lr=protocol.init_lr * 256 / LR_BATCH,
                    top1=float(figures["finetune"]["last"]["top1"]),
                )
            except OSError as error:
                raise ConfigError(
                    f"--out {str(options.out)!r}: cannot be written to: {error.strerror}"
                ) from error
        tell(
            options,
            own,
            name="finetune",
            figures=figures,
            protocol={**asdict(protocol), "lr": protocol.lr, "resize": preprocess.resize},
            data={
                "classes": len(train.classes),
                "train": describe_data(options.train, train.pictures),
                "val": describe_data(options.val, val.pictures),
            },
            table=_table(own, protocol, train, val, fitted.curve, options.out),
        )


def summary(curve: Sequence[Row]) -> dict[str, Any]:
    """{"finetune": {"last": row, "best": row, "curve": rows}}; best is the first of highest top-1.

    The last is the protocol's figure: the best one was chosen by looking at the validation set.
    """
    best = max(curve, key=lambda row: row["top1"])
    return {"finetune": {"last": curve[-1], "best": best, "curve": list(curve)}}


def _protocol(options: argparse.Namespace, own: Session) -> Protocol:
    """The options with what follows from the model and the processes.

    Raises:
        ConfigError: a number that cannot be, or a size that the network cannot take.
    """
    architecture = own.artifact.architecture
    size = options.image_size or own.artifact.preprocess.crop
    patch = architecture.patch_size
    if size < architecture.smallest_side or size % patch:
        near = max(1, size // patch) * patch
        raise ConfigError(
            f"--image-size {size}: must be a multiple of the model's patch size {patch}, and at "
            f"least {architecture.smallest_side}; take e.g. {max(near, architecture.smallest_side)}"
        )
    decay, warmup = options.layer_decay, options.warmup_epochs
    if decay is None:
        decay = 0.75 if architecture.has_attention else 1.0
    taken = {field: getattr(options, field, None) for field in Protocol.__dataclass_fields__}
    derived = {
        "image_size": size,
        "processes": own.here.size,
        "layer_decay": decay,
        "warmup_epochs": min(5.0, options.epochs / 10) if warmup is None else warmup,
    }
    return Protocol(**{**taken, **derived})


def _at_size(preprocess: Preprocess, size: int) -> Preprocess:
    """The same for another crop, with the margin around it in proportion."""
    resize = round(size * preprocess.resize / preprocess.crop)
    return replace(preprocess, resize=resize, crop=size)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r}: cannot be a folder: {error.strerror}") from error


def _describe(
    own: Session,
    protocol: Protocol,
    preprocess: Preprocess,
    train: Labelled,
    figures: dict[str, Any],
) -> Artifact:
    """What the fine-tuned backbone's header will say, on the weights that it started from."""
    parent = {
        "model": own.model.name,
        "fingerprint": own.artifact.fingerprint,
        "provenance": dict(own.artifact.provenance),
    }
    return replace(
        own.artifact,
        preprocess=preprocess,
        provenance={
            "licence": "" if protocol.from_scratch else own.artifact.provenance.get("licence", ""),
            "method": "supervised fine-tuning (protocol of DeiT, arXiv 2012.12877)",
            "parent": None if protocol.from_scratch else parent,
            "protocol": asdict(protocol),
            "classes": len(train.classes),
            "pictures": len(train.labels),
            "torch": str(torch.__version__),
        },
        quality={"finetune": figures["finetune"]["last"]},
        whitening=None,  # it was fitted to other vectors
    )


def _table(
    own: Session,
    protocol: Protocol,
    train: Labelled,
    val: Labelled,
    curve: Sequence[Row],
    out: Path,
) -> str:
    origin = "random weights, " if protocol.from_scratch else ""
    found = summary(curve)["finetune"]
    return "\n".join(
        [
            f"fine-tuning of {own.model.name} ({origin}{own.artifact.architecture.name}) on "
            f"{len(train.labels)} pictures of {len(train.classes)} classes, tested on "
            f"{len(val.labels)}",
            f"  {protocol.image_size} pixels, batch {protocol.batch_size} x {protocol.processes}, "
            f"lr {protocol.lr:.2e}, layer decay {protocol.layer_decay:g}",
            *(line(row, protocol.epochs) for row in curve),
            f"  last: top-1 {found['last']['top1']:.2f} %; best: top-1 "
            f"{found['best']['top1']:.2f} % after epoch {found['best']['epoch']}",
            f"  written: {out / BACKBONE}, {out / HEAD}",
        ]
    )
