"""The loop of a fine-tuning: steps, the accuracy after each epoch, and snapshots to go on from."""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from backbone.preprocess import Preprocess
from training import resume
from training.distributed import World, all_reduce_mean, all_reduce_sum
from training.evaluation.command import describe_data
from training.evaluation.features import stream
from training.evaluation.finetune_data import Mixer, training_loader, training_view
from training.evaluation.finetune_network import Classifier, layer_groups
from training.evaluation.finetune_protocol import Protocol
from training.evaluation.labelled import Labelled
from training.plan import Plan
from training.precision import attention_kernel, autocast, precision_name
from training.signals import StopRequest
from training.snapshot import SnapshotError
from training.tables import ConfigError

Row = dict[str, float]
"""What an epoch came to: epoch (from 1), lr at its end, loss, and top1 and top5 in percent."""


class Fitted(NamedTuple):
    """What `fit` came to.

    Attributes:
        curve: a row for each epoch.
        status: 0 at the end; 128 + the signal's number where one has stopped the run early.
    """

    curve: list[Row]
    status: int


def fit(
    classifier: Classifier,
    train: Labelled,
    val: Labelled,
    *,
    protocol: Protocol,
    preprocess: Preprocess,
    here: World,
    dtype: torch.dtype | None,
    workers: int,
    run_dir: Path,
    model: str,
    snapshot_steps: int = 0,
) -> Fitted:
    """Trains the classifier, or goes on from the newest snapshot in `run_dir`; all processes call.

    A run that was killed and started again gives the figures of one that was not.

    Args:
        preprocess: of the views that `val` is seen in.
        dtype: of autocast; None is fp32.
        model: the fingerprint of what the run starts from.
        snapshot_steps: steps between two snapshots; 0 for one after each epoch.

    Raises:
        DataError: a picture that cannot be read, or too few for one batch.
        ConfigError: snapshots of another run, or that cannot be read or written; a loss that is
            not finite.
    """
    view, mixer = training_view(preprocess, protocol), Mixer(protocol, len(train.classes))
    plan = Plan(
        count=len(train.labels), batch_size=protocol.batch_size, world=here, seed=protocol.seed
    )
    per_epoch, stop = plan.steps_per_epoch, protocol.epochs * plan.steps_per_epoch
    groups = layer_groups(
        classifier, weight_decay=protocol.weight_decay, layer_decay=protocol.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    settings = {
        **asdict(protocol),
        "model": model,
        "precision": precision_name(dtype),
        "train": describe_data((), train.pictures)["names_sha256"],
        "val": describe_data((), val.pictures)["names_sha256"],
    }
    start, total, curve = 0, torch.zeros((), device=here.device), list[Row]()
    if (found := _find(run_dir, here)) is not None:
        start, state = found
        _check_same(state["settings"], settings, run_dir)
        classifier.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        total, curve = state["loss"], state["curve"]
        del found, state
    parallel = _parallel(classifier, here)
    loader = training_loader(
        train, view, plan, start=start, stop=stop, device=here.device, workers=workers
    )
    bar = tqdm(
        total=stop, initial=start, unit="step", desc="finetune", disable=not here.is_main,
        dynamic_ncols=True,
    )  # fmt: skip
    classifier.train()
    with StopRequest() as request, bar:
        for step, (pictures, labels) in enumerate(loader, start):
            # Drop paths, and what is mixed, are drawn anew from the step: resuming is exact.
            torch.manual_seed((protocol.seed * 1_000_003 + step) * here.size + here.rank)
            lr = protocol.lr_at(step, per_epoch)
            pictures, targets = mixer(
                pictures.to(here.device, non_blocking=True),
                labels.to(here.device, non_blocking=True),
                f"{protocol.seed}/{step}/{here.rank} mixed",
            )
            loss = train_step(
                parallel, optimizer, pictures, targets,
                lr=lr, clip_grad=protocol.clip_grad, dtype=dtype,
            )  # fmt: skip
            total = total + all_reduce_mean(loss)
            bar.update()
            ends_epoch = (step + 1) % per_epoch == 0
            last = step + 1 == stop
            if ends_epoch:
                scores = validate(
                    classifier, val, preprocess, here=here, dtype=dtype,
                    batch_size=protocol.batch_size, workers=workers,
                )  # fmt: skip
                epoch = (step + 1) // per_epoch
                mean = _finite(total, epoch) / per_epoch
                curve.append({"epoch": epoch, "lr": lr, "loss": mean, **scores})
                total = torch.zeros_like(total)
                if here.is_main:
                    tqdm.write(line(curve[-1], protocol.epochs), file=sys.stderr)
            wanted = request.wanted() and not last
            if last or wanted or (step + 1) % (snapshot_steps or per_epoch) == 0:
                _finite(total, len(curve) + 1)
                state = {
                    "step": step + 1,
                    "settings": settings,
                    "student": classifier.state_dict(),  # the name that snapshots look for
                    "optimizer": optimizer.state_dict(),
                    "loss": total,
                    "curve": curve,
                }
                _save(run_dir, step + 1, state, here, must=last or wanted)
            if wanted:
                if here.is_main:
                    told = f"{request.name}: stopped after step {step + 1}, which is saved; "
                    tqdm.write(f"{told}the same command goes on", file=sys.stderr)
                return Fitted(curve, request.status)
    return Fitted(curve, 0)


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    pictures: Tensor,
    targets: Tensor,
    *,
    lr: float,
    clip_grad: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """One step on pictures [B, C, S, S] with targets [B, classes]; returns the loss, a scalar.

    Args:
        lr: of groups whose `lr_scale` is 1.
        clip_grad: see `Protocol`.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    with autocast(pictures.device, dtype):
        logits = network(pictures)
    loss = F.cross_entropy(logits.float(), targets)
    with attention_kernel(pictures.device, dtype):
        torch.autograd.backward(loss)
    if clip_grad > 0:
        nn.utils.clip_grad_norm_(network.parameters(), clip_grad)
    optimizer.step()
    return loss.detach()


def validate(
    classifier: Classifier,
    val: Labelled,
    preprocess: Preprocess,
    *,
    here: World,
    dtype: torch.dtype | None,
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """Top-1 and top-5 in percent of the centre crops of `val`, over all processes.

    Raises:
        DataError: a picture that cannot be read.
    """

    def embed(batch: Tensor) -> dict[str, Tensor]:
        with autocast(here.device, dtype):
            return {"logits": classifier(batch).float()}

    classifier.eval()
    found = stream(
        val.pictures, preprocess.centre_crop, embed,
        here=here, batch_size=batch_size, workers=workers, title="val",
    )  # fmt: skip
    hits = torch.zeros(2, dtype=torch.int64, device=here.device)
    for places, outputs in found:
        best = outputs["logits"].topk(min(5, len(val.classes)), dim=1).indices
        right = best == val.labels[places].to(here.device)[:, None]
        hits += torch.stack((right[:, 0].sum(), right.sum()))
    classifier.train()
    top1, top5 = (100.0 * all_reduce_sum(hits).double() / len(val.labels)).tolist()
    return {"top1": top1, "top5": top5}


def line(row: Row, epochs: int) -> str:
    """An epoch, for people."""
    return (
        f"  epoch {row['epoch']:>3} of {epochs}: lr {row['lr']:.2e}, loss {row['loss']:.4f}, "
        f"top-1 {row['top1']:5.2f} %, top-5 {row['top5']:5.2f} %"
    )


def _parallel(classifier: Classifier, here: World) -> nn.Module:
    """What is called in training: the classifier, over several processes wrapped in DDP."""
    if here.size == 1:
        return classifier
    return DistributedDataParallel(
        classifier,
        device_ids=[here.device] if here.device.type == "cuda" else None,
    )


def _finite(total: Tensor, epoch: int) -> float:
    """The loss summed over the epoch so far; the same on every process."""
    value = total.item()
    if not math.isfinite(value):
        raise ConfigError(
            f"the loss of epoch {epoch} is not finite: lower --init-lr, take --precision fp32, or "
            "clip gradients (--clip-grad 1)"
        )
    return value


def _find(run_dir: Path, here: World) -> tuple[int, dict[str, Any]] | None:
    try:
        return resume.find(run_dir, here)
    except SnapshotError as error:
        raise ConfigError(f"--out: {error}") from error


def _save(run_dir: Path, step: int, state: dict[str, Any], here: World, *, must: bool) -> None:
    try:
        resume.save(run_dir, step, state, here, keep=2, must=must)
    except SnapshotError as error:
        raise ConfigError(f"--out: {error}") from error


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], run_dir: Path) -> None:
    """Refuses to go on with what another command has begun."""
    changed = [
        f"{key} was {old.get(key)!r} and is {value!r}"
        for key, value in new.items()
        if old.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"--out {str(run_dir.parent)!r} holds a run of another command: {'; '.join(changed)}; "
            "take the old values, or another folder"
        )
