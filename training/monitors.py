"""What a run says of itself: a progress bar, a CSV file, TensorBoard events, alarms in words."""

import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.collapse import CollapseAlarm
from training.distributed import World, all_reduce_mean
from training.rows import RowFile

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "teacher_entropy",
    "kl",
    "center_norm",
    "gradient_norm",
    "agreement",
    "skipped_steps",
    "bad_pictures",
    "lr",
    "weight_decay",
    "teacher_momentum",
    "teacher_temperature",
    "images_per_s",
    "data_wait_share",
    "memory_mib",
    "eta_s",
)
_BAR_EVERY_S = 30.0
_OWN = ("bad_pictures",)  # what each process counts for itself: the row has the sum


class Monitor:
    """Collects a run's figures without waiting for the device, and writes them every few steps.

    A row holds means over the steps since the row before and over all processes; figures that are
    not finite are left out of them. On ranks other than 0 it only takes part in these means.

    Args:
        run_dir: gets `log.csv`, `alarms.log` and `tensorboard/`. What a resumed run will write
            again is dropped from them when it opens.
        start, stop: the steps of this run.
        batch_size: pictures per step over all processes.
        every: steps between two rows.
        alarm: is shown each row, and what it says is printed and kept in `alarms.log`.
        wandb: a run of `training.wandb_run.start_wandb`, or None.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        start: int,
        stop: int,
        batch_size: int,
        every: int,
        alarm: CollapseAlarm | None = None,
        wandb: Any = None,
    ) -> None:
        self._world = world
        self._batch_size = batch_size
        self._every = every
        self._start, self._stop = start, stop
        self._figures: list[Tensor] = []
        self._waited_s = self._paused_s = 0.0
        self._began = self._since = time.perf_counter()
        self._log: RowFile | None = None
        if world.is_main:
            self._log = RowFile(run_dir / "log.csv", COLUMNS, start=start)
            self._alarm = alarm
            self._alarms = run_dir / "alarms.log"
            _drop_lines(self._alarms, start)
            for row in self._log.kept:  # so that what was said before is not said again
                _show(alarm, row)
            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
            self._wandb = wandb
            self._bar = tqdm(
                total=stop,
                initial=start,
                unit="step",
                dynamic_ncols=True,
                # A batch job's output is a file, which would keep every drawing.
                mininterval=0.1 if sys.stderr.isatty() else _BAR_EVERY_S,
            )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - before

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leaves the time inside (an evaluation, a report) out of images/s and the data wait."""
        before = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - before

    def step(
        self,
        step: int,
        epoch: int,
        figures: Mapping[str, Tensor],
        rates: Mapping[str, float],
        counts: Mapping[str, float] | None = None,
    ) -> None:
        """Takes in a step, counted from 0; every process must call it.

        Args:
            figures: scalars on the device, the same names each time.
            rates: what the step ran with, the same on every process.
            counts: running totals: `skipped_steps`, which all processes have in common, and
                `bad_pictures`, of which this process gives its own.
        """
        values = [value.detach().float().reshape(()) for value in figures.values()]
        self._figures.append(torch.stack(values))
        if self._log is not None:
            self._bar.update(step + 1 - self._bar.n)
        if (step + 1) % self._every and step + 1 != self._stop:
            return
        counts = counts or {}
        totals = torch.tensor(list(counts.values()), dtype=torch.float32)
        by_step = torch.stack(self._figures)
        # One exchange, and one wait for the device.
        shared = all_reduce_mean(torch.cat((by_step.flatten(), totals.to(by_step.device))))
        means = _finite_means(shared[: by_step.numel()].reshape(by_step.shape))
        found = torch.cat((means, shared[by_step.numel() :])).tolist()
        now, done = time.perf_counter(), len(self._figures)
        elapsed = now - self._since - self._paused_s
        row = {
            "step": step + 1,
            "epoch": epoch,
            **dict(zip([*figures, *counts], found, strict=True)),
            **rates,
            "images_per_s": done * self._batch_size / elapsed,
            "data_wait_share": self._waited_s / elapsed,
            "memory_mib": _memory_mib(self._world.device),
            "eta_s": (now - self._began) / (step + 1 - self._start) * (self._stop - step - 1),
        }
        row |= {name: round(row[name] * self._world.size) for name in _OWN if name in row}
        if self._log is not None:
            self._write(self._log, row)
        self._figures.clear()
        self._waited_s = self._paused_s = 0.0
        self._since = time.perf_counter()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds figures of another kind, by their tags, to TensorBoard (and W&B) after `step`."""
        if self._log is None:
            return
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def _write(self, log: RowFile, row: dict[str, float]) -> None:
        step = int(row["step"])
        log.write(row)
        self.scalars(step, {name: value for name, value in row.items() if name != "step"})
        self._bar.set_postfix(
            loss=f"{row['loss']:.3f}",
            entropy=f"{row['teacher_entropy']:.3f}",
            kl=f"{row['kl']:.3f}",
            images_per_s=f"{row['images_per_s']:.1f}",
            refresh=False,
        )
        for said in _show(self._alarm, row):
            with self._alarms.open("a", encoding="utf-8") as file:
                file.write(f"step {step}: {said}\n")
            tqdm.write(f"step {step}: {said}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._log is not None:
            self._log.close()
            self._events.close()
            self._bar.close()
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)


class TrainingDiverged(ValueError):
    """The loss is not a finite number; what was saved before is."""


def _finite_means(values: Tensor) -> Tensor:
    """The means [F] of what is finite in values [steps, F]; NaN where nothing is."""
    finite = values.isfinite()
    return values.where(finite, 0.0).sum(dim=0) / finite.sum(dim=0)


def _show(alarm: CollapseAlarm | None, row: Mapping[str, float | str]) -> list[str]:
    if alarm is None or "" in (row["teacher_entropy"], row["kl"]):
        return []
    return alarm.see(int(row["step"]), float(row["teacher_entropy"]), float(row["kl"]))


def _memory_mib(device: torch.device) -> float:
    """The most memory that was in use: on CUDA torch's own there, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here


def _drop_lines(alarms: Path, start: int) -> None:
    """Keeps what was said up to step `start`: a resumed run will say the rest again."""
    if not alarms.exists():
        return
    lines = alarms.read_text(encoding="utf-8").splitlines(keepends=True)
    steps = [re.match(r"step (\d+):.*\n", line) for line in lines]  # none in a half-written one
    kept = [match[0] for match in steps if match and int(match[1]) <= start]
    if len(kept) < len(lines):
        alarms.write_text("".join(kept), encoding="utf-8")
