"""From sources of pictures to the batches of a run, in the order in which it sees them."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from training.config import Data
from training.distributed import World
from training.plan import Plan
from training.samples import Maker, Sample, batch_of, first_good
from training.shards import Shards, count_shards
from training.sources import DataError, Pictures, find_shards, open_pictures
from training.streaming import StreamedBatches

T = TypeVar("T")


def open_source(data: Data, run_dir: Path, world: World) -> Pictures | Shards:
    """What `data.train` names, to be read at random or, with `data.stream`, from front to back.

    All processes must call this: they share the counting of shards, which `run_dir/shards.json`
    remembers.

    Raises:
        DataError: a path that cannot be used.
    """
    if data.stream:
        return count_shards(find_shards(data.train), run_dir / "shards.json", world)
    return open_pictures(data.train)


def picture_count(source: Pictures | Shards) -> int:
    """How many pictures it holds."""
    return source.count if isinstance(source, Shards) else len(source.names)


def crop_loader(
    source: Pictures | Shards,
    maker: Maker[Any],
    plan: Plan,
    data: Data,
    *,
    start: int,
    stop: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Gives the batches that `maker` makes, `plan.accumulation` a step, from `start` to `stop`.

    Read at random, they do not depend on the number of workers; streamed, they do.
    """
    workers = data.workers
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


def worker_settings(workers: int) -> dict[str, Any]:
    """A `DataLoader`'s arguments for `workers` processes.

    They are forked, whatever Python's default is: they read unpacked tar files, which have no name
    in the file system, through inherited descriptors, and share the list of pictures in memory.
    """
    return {
        "num_workers": workers,
        "multiprocessing_context": "fork" if workers else None,
        "worker_init_fn": one_thread,
    }


def one_thread(_: int) -> None:
    """For a loader's worker: leaves the cores to the other workers."""
    torch.set_num_threads(1)


def one_line(error: Exception) -> str:
    """What `error` says, without the traceback that a loader wraps a worker's `DataError` in."""
    return str(error).strip().rpartition(f"{DataError.__name__}: ")[2]


def _as_it_is(batch: T) -> T:
    return batch
