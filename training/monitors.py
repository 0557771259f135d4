"""What a run says of itself: a progress bar, a CSV file and TensorBoard events."""

import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.distributed import World, all_reduce_mean

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "teacher_entropy",
    "kl",
    "agreement",
    "gradient_norm",
    "lr",
    "weight_decay",
    "teacher_momentum",
    "teacher_temperature",
    "images_per_s",
    "data_wait_share",
)


class Monitor:
    """Collects a run's figures without waiting for the device, and writes them every few steps.

    On ranks other than 0 it only takes part in the means over processes. Rows of the CSV file that
    a resumed run will write again are dropped when it opens.

    Args:
        run_dir: gets `log.csv` and `tensorboard/`.
        start, stop: the steps of this run.
        batch_size: pictures per step over all processes.
        every: steps between two rows.
    """

    def __init__(
        self, run_dir: Path, world: World, *, start: int, stop: int, batch_size: int, every: int
    ) -> None:
        self._world = world
        self._batch_size = batch_size
        self._every = every
        self._stop = stop
        self._sums: list[Tensor] = []
        self._waited_s = 0.0
        self._since = time.perf_counter()
        self._steps = 0
        self._file: IO[str] | None = None
        if world.is_main:
            self._file = _open_log(run_dir / "log.csv", start)
            self._csv = csv.DictWriter(self._file, COLUMNS)
            if self._file.tell() == 0:
                self._csv.writeheader()
            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
            self._bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - before

    def step(
        self, step: int, epoch: int, figures: dict[str, Tensor], rates: dict[str, float]
    ) -> None:
        """Takes one step's scalars on the device, and the rates it ran with; writes when due."""
        values = torch.stack([value.detach().float().reshape(()) for value in figures.values()])
        self._sums.append(values)
        self._steps += 1
        if (step + 1) % self._every and step + 1 != self._stop:
            return
        averaged = all_reduce_mean(torch.stack(self._sums).mean(dim=0))
        check_finite(averaged[0], step)
        means = averaged.tolist()
        elapsed = time.perf_counter() - self._since
        row = {
            "step": step + 1,
            "epoch": epoch,
            **dict(zip(figures, means, strict=True)),
            **rates,
            "images_per_s": self._steps * self._batch_size / elapsed,
            "data_wait_share": self._waited_s / elapsed,
        }
        self._write(row)
        self._sums.clear()
        self._steps, self._waited_s, self._since = 0, 0.0, time.perf_counter()

    def _write(self, row: dict[str, float]) -> None:
        if self._file is None:
            return
        self._csv.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, int(row["step"]))
        self._bar.set_postfix(
            loss=f"{row['loss']:.3f}",
            entropy=f"{row['teacher_entropy']:.3f}",
            kl=f"{row['kl']:.3f}",
            images_per_s=f"{row['images_per_s']:.1f}",
        )
        self._bar.update(int(row["step"]) - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()
            self._bar.close()


class TrainingDiverged(ValueError):
    """The loss is not a finite number; what was saved before is."""


def check_finite(loss: Tensor, step: int) -> None:
    """Stops every process where the loss of any is not finite, before it reaches a snapshot.

    Raises:
        TrainingDiverged: with what may help.
    """
    if not bool(all_reduce_mean(loss.detach()).isfinite()):
        raise TrainingDiverged(
            f"the loss is not finite in step {step + 1}; the last snapshot is from before. Lower "
            "optimizer.lr, lengthen optimizer.warmup_epochs, or take precision = 'fp32'"
        )


def _open_log(path: Path, start: int) -> IO[str]:
    if path.exists():
        with path.open(newline="") as old:
            rows = [row for row in csv.DictReader(old) if int(row["step"]) <= start]
        with path.open("w", newline="") as new:
            writer = csv.DictWriter(new, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return path.open("a", newline="")
