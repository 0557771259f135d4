"""Which part of a run's pictures each step, process and forward takes."""

from collections.abc import Iterator
from dataclasses import dataclass

from training.distributed import World
from training.picture_files import DataError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The batches of a run over `count` pictures, as process `world.rank` of `world.size` sees it.

    A step takes `accumulation` batches of `batch_size` pictures on every process. What does not
    fill a step at an epoch's end is left out of that epoch.

    Raises:
        DataError: the pictures do not fill one step.
    """

    count: int
    batch_size: int
    world: World
    seed: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.count < self.pictures_per_step:
            times = f" x {self.accumulation} forwards" if self.accumulation > 1 else ""
            raise DataError(
                f"{self.count} pictures do not fill one batch of {self.pictures_per_step} "
                f"(batch_size {self.batch_size}{times} x {self.world.size} processes); "
                "lower batch_size"
            )

    @property
    def pictures_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulation * self.world.size

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in the pictures."""
        return self.count // self.pictures_per_step

    @property
    def batches_per_epoch(self) -> int:
        """Of this process: `accumulation` times the steps."""
        return self.steps_per_epoch * self.accumulation

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """This process's batches in steps `start` to `stop`: epoch, and number in the epoch."""
        for batch in range(start * self.accumulation, stop * self.accumulation):
            yield divmod(batch, self.batches_per_epoch)
