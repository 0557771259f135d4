"""Training linear probes, with a curve and a snapshot after every epoch to go on from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from training import resume
from training.config import ConfigError
from training.distributed import World, all_reduce_sum
from training.evaluation.features import share
from training.evaluation.labelled import Labelled
from training.evaluation.linear_features import (
    Batch,
    Frozen,
    Order,
    Rows,
    features_folder,
    of_random_crops,
    of_rows,
    store,
)
from training.evaluation.linear_probes import LinearProbes
from training.schedules import cosine
from training.snapshot import KEEP, SnapshotError

_CHUNK = 1024


class LinearRun:
    """What is known after each epoch; in the folder `out` also for a process that comes later.

    Args:
        out: where snapshots go; None keeps none.
        settings: plain values that the figures depend on, by the option that sets each.
        here: this process.

    Attributes:
        curve: of each epoch {"epoch": 1, "rates": {"0.001": {"loss": .., "top1": .., "top5": ..}}};
            percent are those on the validation pictures; the loss is the training's mean, or None
            where it is not finite.
    """

    def __init__(self, out: Path | None, settings: Mapping[str, Any], here: World) -> None:
        self.out = out
        self.curve: list[dict[str, Any]] = []
        self._settings = dict(settings)
        self._here = here

    def restore(self, probes: LinearProbes) -> int:
        """Goes on from the newest whole snapshot; returns the epochs done. Every process calls it.

        Raises:
            ConfigError: `out` holds a run of other settings, which are named, or of another kind,
                or damaged snapshots alone.
        """
        if self.out is None:
            return 0
        try:
            found = resume.find(self.out, self._here)
        except SnapshotError as error:
            raise ConfigError(f"--out {self.out}: {error}") from error
        if found is None:
            return 0
        done, state = found
        if "linear" not in state:
            raise ConfigError(f"--out {self.out} holds another program's run; take another folder")
        old, new = state["linear"], self._settings
        changed = [
            f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ConfigError(
                f"--out {self.out} holds a run of other settings: {'; '.join(changed)}; "
                "take the old values, or another folder"
            )
        probes.load(state["student"])
        self.curve = list(state["curve"])
        return done

    def finish_epoch(
        self,
        probes: LinearProbes,
        bases: Sequence[float],
        losses: Sequence[float],
        measured: Sequence[tuple[float, float]],
        *,
        last: bool,
    ) -> None:
        """Adds an epoch to the curve, and writes a snapshot. Every process calls it.

        Raises:
            ConfigError: the last snapshot cannot be written. An earlier one that cannot is told on
                stderr.
        """
        rates = {
            str(base): {"loss": loss if math.isfinite(loss) else None, "top1": top1, "top5": top5}
            for base, loss, (top1, top5) in zip(bases, losses, measured, strict=True)
        }
        self.curve.append({"epoch": len(self.curve) + 1, "rates": rates})
        if self.out is None:
            return
        done = len(self.curve)
        state = {
            "step": done,
            "student": probes.state(),  # what snapshots call the part that learns
            "linear": self._settings,
            "curve": self.curve,
        }
        try:
            resume.save(self.out, done, state, self._here, keep=KEEP, must=last)
        except SnapshotError as error:
            raise ConfigError(f"--out {self.out}: {error}") from error

    def results(self) -> dict[str, dict[str, float]]:
        """Of each rate top-1 and top-5 after the last epoch, and its highest top-1 of any epoch."""
        return {
            rate: {
                "top1": found["top1"],
                "top5": found["top5"],
                "highest_top1": max(each["rates"][rate]["top1"] for each in self.curve),
            }
            for rate, found in self.curve[-1]["rates"].items()
        }


def learning_rates(bases: list[float], *, batch: int, epoch: int, epochs: int) -> list[float]:
    """Each base x batch / 256, on a cosine to 0 that moves once an epoch, as in the original."""
    return [cosine(epoch, base=base * batch / 256, final=0.0, total_steps=epochs) for base in bases]


def fit(
    train: Labelled,
    val: Labelled,
    frozen: Frozen,
    run: LinearRun,
    *,
    bases: list[float],
    epochs: int,
    augment: bool,
    seed: int,
    here: World,
) -> LinearProbes:
    """Trains a probe for each of `bases`, and measures all after every epoch: see `run.curve`.

    A run that was stopped goes on from its last whole epoch.

    Args:
        augment: a new random crop of every picture each epoch; else every picture's centre crop,
            embedded once.

    Raises:
        ConfigError: features or snapshots cannot be written, or the run is one of other settings.
        DataError: a picture that cannot be read; it is named.
    """
    order = Order(
        count=len(train.labels), batch=frozen.batch_size * here.size, seed=seed, here=here
    )
    probes = LinearProbes(
        len(bases), frozen.length, len(train.classes), seed=seed, device=here.device
    )
    start = run.restore(probes)
    if start == epochs:
        return probes
    with ExitStack() as stack:
        folder = stack.enter_context(features_folder(run.out, here))
        asked = store(folder / "val", val.pictures, frozen, here)
        if augment:
            batches = of_random_crops(train.pictures, frozen, order, start=start, stop=epochs)
        else:
            kept = store(folder / "train", train.pictures, frozen, here)
            batches = of_rows(kept, order, start=start, stop=epochs)
        bar = stack.enter_context(_bar(order, start, epochs))
        for epoch in range(start, epochs):
            lrs = learning_rates(bases, batch=order.batch, epoch=epoch, epochs=epochs)
            losses = _train_epoch(probes, batches, train.labels, order, lrs, bar)
            measured = measure(probes, asked, val.labels, here)
            run.finish_epoch(probes, bases, losses, measured, last=epoch + 1 == epochs)
            bar.set_postfix_str(f"top-1 {max(top1 for top1, _ in measured):.2f} %")
    return probes


def measure(
    probes: LinearProbes, rows: Rows, labels: Tensor, here: World
) -> list[tuple[float, float]]:
    """Top-1 and top-5 in percent of each rate on features [N, D], shared by the processes."""
    hits = torch.zeros(len(probes.weight), 2, dtype=torch.int64, device=here.device)
    own = share(len(labels), here)
    for at in range(own.start, own.stop, _CHUNK):
        chunk = slice(at, min(at + _CHUNK, own.stop))
        features = torch.from_numpy(rows[chunk].copy()).to(here.device)
        hits += probes.hits(features, labels[chunk].to(here.device))
    percent = 100.0 * all_reduce_sum(hits).double() / len(labels)
    return [(top1, top5) for top1, top5 in percent.tolist()]


def _train_epoch(
    probes: LinearProbes,
    batches: Iterator[Batch],
    labels: Tensor,
    order: Order,
    lrs: list[float],
    bar: "tqdm[NoReturn]",
) -> list[float]:
    """Takes one epoch's steps from `batches`; returns each rate's mean loss over its pictures."""
    device = order.here.device
    rates = torch.tensor(lrs, device=device)
    losses = torch.zeros(len(lrs), device=device)
    for step, (places, features) in enumerate(islice(batches, order.steps_per_epoch)):
        batch = order.batch_of(step)
        losses += probes.step(features, labels[places].to(device), rates, batch=batch)
        bar.update(batch)
    found: list[float] = (all_reduce_sum(losses) / order.count).tolist()
    return found


def _bar(order: Order, start: int, epochs: int) -> "tqdm[NoReturn]":
    """Counts the pictures of a whole run, over all processes."""
    return tqdm(
        total=epochs * order.count,
        initial=start * order.count,
        unit="picture",
        desc="linear",
        dynamic_ncols=True,
        disable=not order.here.is_main,
    )
