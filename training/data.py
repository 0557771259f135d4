"""From sources of pictures to the batches of a run, in the order in which it sees them."""

import random
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.augmentations import draw_views, normalise
from training.config import Crops, Data
from training.device_augmentations import augment, view_table
from training.distributed import World
from training.pictures_on_device import PicturesOnDevice
from training.plan import Plan
from training.samples import (
    Bad,
    CropBatch,
    CropMaker,
    DrawnMaker,
    Maker,
    Sample,
    batch_of,
    first_good,
)
from training.shards import Shards, count_shards
from training.sources import DataError, Pictures, find_shards, open_pictures
from training.streaming import StreamedBatches
from training.workers import worker_settings

T = TypeVar("T")


Source = Pictures | Shards | PicturesOnDevice
"""What a run's pictures are read from: at random, from front to back, or from the device."""


def open_source(data: Data, run_dir: Path, world: World) -> Source:
    """What `data.train` names.

    All processes must call this: they share the counting of shards, which `run_dir/shards.json`
    remembers.

    Raises:
        DataError: a path that cannot be used.
    """
    if data.stream:
        return count_shards(find_shards(data.train), run_dir / "shards.json", world)
    pictures = open_pictures(data.train)
    if not data.on_device:
        return pictures
    return PicturesOnDevice(
        pictures,
        device=world.device,
        channels=data.channels,
        workers=data.workers,
        progress=world.is_main,
    )


def picture_count(source: Source) -> int:
    """How many pictures it holds."""
    return source.count if isinstance(source, Shards) else len(source.names)


def at_random(source: Source) -> Pictures | None:
    """The source's pictures, to be read one by one; None for a stream."""
    if isinstance(source, Shards):
        return None
    return source.pictures if isinstance(source, PicturesOnDevice) else source


def crop_loader(
    source: Source,
    plan: Plan,
    data: Data,
    crops: Crops,
    *,
    start: int,
    stop: int,
    device: torch.device,
) -> DataLoader[Any]:
    """Gives `plan.accumulation` batches a step, from `start` to `stop`; see `to_crops`.

    Read at random, they do not depend on the number of workers; streamed, they do.
    """
    workers, pin_memory = data.workers, device.type == "cuda"
    if isinstance(source, PicturesOnDevice):
        return DataLoader(
            HeldViews(source, crops, seed=plan.seed),
            batch_sampler=RunSampler(plan, start=start, stop=stop),
            collate_fn=_held_batch,
            pin_memory=pin_memory,
            **worker_settings(workers),
        )
    on_device = data.augment == "device" or (data.augment == "auto" and device.type == "cuda")
    maker: Maker[Any] = (DrawnMaker if on_device else CropMaker)(crops, channels=data.channels)
    if isinstance(source, Shards):
        stream = StreamedBatches(
            source,
            maker,
            plan,
            start=start,
            stop=stop,
            buffer=data.shuffle_buffer,
            workers=workers,
        )
        return DataLoader(
            stream,
            batch_size=None,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            **worker_settings(workers),
        )
    return DataLoader(
        PictureDataset(source, maker, seed=plan.seed),
        batch_sampler=RunSampler(plan, start=start, stop=stop),
        collate_fn=partial(batch_of, maker=maker),
        pin_memory=pin_memory,
        **worker_settings(workers),
    )


def to_crops(
    batch: Any,
    source: Source,
    data: Data,
    crops: Crops,
    device: torch.device,
    *,
    compiled: bool = False,
) -> list[Tensor]:
    """A loader's batch -> its normalised crops on the device, global ones first, each [B, C, S, S].

    What the workers have not made of the pictures, the device makes, in compiled kernels if
    `compiled`.
    """
    if isinstance(batch, CropBatch):
        parts = [part.to(device, non_blocking=True) for part in batch[:2]]
    elif isinstance(batch, HeldBatch):
        assert isinstance(source, PicturesOnDevice)
        canvas, sizes = source.batch(batch.indices)
        parts = [*augment(canvas, sizes, batch.views, crops, compiled=compiled)]
    else:
        canvas, sizes, views = batch.pictures
        canvas = canvas.to(device, non_blocking=True)
        parts = [*augment(canvas, sizes, views, crops, compiled=compiled)]
    mean, std = _on_device(data.mean, device), _on_device(data.std, device)
    return [crop for part in parts for crop in normalise(part, mean, std)]


@lru_cache(maxsize=8)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C, 1, 1], sent once: a copy each step would wait for the device."""
    return torch.tensor(values, device=device).reshape(-1, 1, 1)


class HeldBatch(NamedTuple):
    """A batch of pictures that are on the device: their numbers, and their views [B, 2 + N, 16]."""

    indices: list[int]
    views: Tensor
    names: list[str]
    bad: Bad


class HeldViews(Dataset[tuple[int, Tensor, str]]):
    """(epoch, index) -> the views, in that epoch, of a picture that is on the device."""

    def __init__(self, held: PicturesOnDevice, crops: Crops, *, seed: int) -> None:
        self._names, self._sizes = held.names, held.sizes
        self._crops = crops
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor, str]:
        epoch, i = key
        height, width = self._sizes[i].tolist()
        rng = random.Random(f"{self._seed}/{epoch}/{i}")
        return i, view_table(draw_views(width, height, self._crops, rng)), self._names[i]


def _held_batch(samples: list[tuple[int, Tensor, str]]) -> HeldBatch:
    indices, views, names = zip(*samples, strict=True)
    return HeldBatch(list(indices), torch.stack(views), list(names), ())


class PictureDataset(Dataset[Sample[T]], Generic[T]):
    """(epoch, index) -> what `maker` makes of that picture in that epoch.

    Others, drawn from (seed, epoch, index), take the place of one that cannot be read.
    """

    def __init__(self, pictures: Pictures, maker: Maker[T], *, seed: int) -> None:
        self._pictures = pictures
        self._maker = maker
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample[T]:
        """Raises `DataError` as `first_good`."""
        epoch, i = key
        place = f"{self._seed}/{epoch}/{i}"
        candidates = (
            (self._pictures.names[each], partial(self._pictures.read, each))
            for each in self._candidates(i, place)
        )
        return first_good(candidates, self._maker, place)

    def _candidates(self, i: int, place: str) -> Iterator[int]:
        yield i
        others = random.Random(f"{place}/instead")
        while True:
            yield others.randrange(len(self._pictures.names))


class RunSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one process from one step of a run to its end, as lists of (epoch, index).

    An epoch is a permutation that depends on the seed and the epoch alone. A step takes a slice of
    it over all processes and forwards, of which each takes its own part: two processes with half
    the batch, or one that accumulates two halves, see what one sees with the whole.
    """

    def __init__(self, plan: Plan, *, start: int, stop: int) -> None:
        self._plan = plan
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return (self._stop - self._start) * self._plan.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self._plan
        order = np.empty(0, dtype=np.int64)
        drawn = -1
        for epoch, batch in plan.batches(self._start, self._stop):
            if epoch != drawn:
                order = np.random.default_rng((plan.seed, epoch)).permutation(plan.count)
                drawn = epoch
            step, forward = divmod(batch, plan.accumulation)
            before = (step * plan.world.size + plan.world.rank) * plan.accumulation + forward
            first = before * plan.batch_size
            yield [(epoch, i) for i in order[first : first + plan.batch_size].tolist()]


def one_line(error: Exception) -> str:
    """What `error` says, without the traceback that a loader wraps a worker's `DataError` in."""
    return str(error).strip().rpartition(f"{DataError.__name__}: ")[2]


def _as_it_is(batch: T) -> T:
    return batch
