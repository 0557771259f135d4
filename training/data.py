"""From encoded pictures to batches of crops, and the order in which a run sees them."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.augmentations import multi_crop
from training.config import Crops
from training.decoding import decode
from training.distributed import World
from training.sources import DataError, Pictures


class CropBatch(NamedTuple):
    """The crops of a batch: 8-bit, global [2, B, 3, G, G] and local [N, B, 3, L, L]."""

    global_crops: Tensor
    local_crops: Tensor


class MultiCropDataset(Dataset[tuple[Tensor, Tensor]]):
    """(epoch, index) -> the multi-crop of that picture in that epoch."""

    def __init__(self, pictures: Pictures, crops: Crops, *, seed: int) -> None:
        self._pictures = pictures
        self._crops = crops
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """8-bit tensors [2, 3, G, G] and [N, 3, L, L]."""
        epoch, i = key
        picture = decode(self._pictures.read(i), self._pictures.names[i])
        rng = random.Random(f"{self._seed}/{epoch}/{i}")
        global_crops, local_crops = multi_crop(picture, self._crops, rng)
        return torch.from_numpy(global_crops), torch.from_numpy(local_crops)


class RunSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one rank from one step of a run to its end, as lists of (epoch, index).

    An epoch is a permutation that depends on the seed and the epoch alone. The step's batch is a
    slice of it over all ranks, of which each takes its own part: two ranks with half the batch see
    what one sees with the whole. What is left over at an epoch's end is dropped.
    """

    def __init__(
        self, count: int, *, batch_size: int, world: World, seed: int, start: int, stop: int
    ) -> None:
        self._count = count
        self._batch_size = batch_size
        self._world = world
        self._seed = seed
        self._start, self._stop = start, stop
        self.steps_per_epoch = steps_per_epoch(count, batch_size, world)

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.empty(0, dtype=np.int64)
        drawn = -1
        for step in range(self._start, self._stop):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
                drawn = epoch
            first = (place * self._world.size + self._world.rank) * self._batch_size
            batch = order[first : first + self._batch_size]
            yield [(epoch, i) for i in batch.tolist()]


def steps_per_epoch(count: int, batch_size: int, world: World) -> int:
    """Whole batches over all ranks in `count` pictures.

    Raises:
        DataError: not even one.
    """
    whole = batch_size * world.size
    if count < whole:
        raise DataError(
            f"{count} pictures do not fill one batch of {whole} "
            f"(batch_size {batch_size} x {world.size} processes); lower batch_size"
        )
    return count // whole


def crop_loader(
    dataset: MultiCropDataset, sampler: RunSampler, *, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Gives a `CropBatch` a step, in the sampler's order whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=one_thread,
    )


def _collate(samples: list[tuple[Tensor, Tensor]]) -> CropBatch:
    return CropBatch(*(torch.stack(part, dim=1) for part in zip(*samples, strict=True)))


def one_thread(_: int) -> None:
    """For a loader's worker: leaves the cores to the other workers."""
    torch.set_num_threads(1)


def one_line(error: Exception) -> str:
    """What `error` says, without the traceback that a loader wraps a worker's `DataError` in."""
    return str(error).strip().rpartition(f"{DataError.__name__}: ")[2]
