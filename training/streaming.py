"""Shards read from front to back: nothing is unpacked to disk, nothing read at random.

An epoch's sequence is the shards in an order of its own, one after the other, as a ring that begins
at a place of its own: what a last batch leaves out differs from epoch to epoch. Each worker of each
process owns a range of the ring; a shuffle buffer mixes what lies near in it. The order that comes
out of the buffer is computed before anything is read, so that going on in the middle of an epoch is
skipping, without decoding, what was given before.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info

from training.picture_files import DataError
from training.plan import Plan
from training.samples import TRIES, Maker, batch_of, first_good
from training.shards import Shards, read_shard

T = TypeVar("T")
Order = npt.NDArray[np.int64]


class StreamedBatches(IterableDataset[Any]):
    """The batches of one process from step `start` to `stop`, in order.

    A `DataLoader` takes them from its workers in turn: worker w makes every W-th batch from the
    w-th. Which pictures stand in a batch depends on seed, epoch, and the numbers of processes and
    workers; a picture's crops, on seed, epoch and its number in the data set.

    Args:
        buffer: pictures that each worker holds, encoded, to choose the next from.
        workers: the loader's number; 0 is as 1.
    """

    def __init__(
        self,
        shards: Shards,
        maker: Maker[T],
        plan: Plan,
        *,
        start: int,
        stop: int,
        buffer: int,
        workers: int,
    ) -> None:
        self._shards = shards
        self._maker = maker
        self._plan = plan
        self._start, self._stop = start, stop
        self._buffer = buffer
        self._lanes = max(workers, 1)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        place = 0 if worker is None else worker.id
        opened: tuple[int, int] | None = None
        samples: Iterator[Any] = iter(())
        own = islice(self._plan.batches(self._start, self._stop), place, None, self._lanes)
        for epoch, batch in own:
            lane, before = batch % self._lanes, batch // self._lanes
            if (epoch, lane) != opened:
                opened = epoch, lane
                samples = self._samples(epoch, lane, skipped=before * self._plan.batch_size)
            yield batch_of(list(islice(samples, self._plan.batch_size)), self._maker)

    def _samples(self, epoch: int, lane: int, *, skipped: int) -> Iterator[Any]:
        """What one lane of an epoch gives, without the first `skipped`."""
        plan, rank = self._plan, self._plan.world.rank
        batches = plan.batches_per_epoch
        earlier = rank * batches + sum(_turns(batches, each, self._lanes) for each in range(lane))
        length = _turns(batches, lane, self._lanes) * plan.batch_size
        ring = _Ring(self._shards, np.random.default_rng((plan.seed, epoch)))
        rng = np.random.default_rng((plan.seed, epoch, rank, lane))
        # After the range stand those who may take a bad picture's place at its very end.
        spare = np.arange(length, length + TRIES - 1)
        order = np.concatenate((buffered_order(length, self._buffer, rng), spare))
        turns = np.argsort(order)
        pictures = enumerate(ring.walk(earlier * plan.batch_size, len(order)))
        held: dict[int, _Held] = {}

        def fetch(turn: int) -> _Held:
            wanted = int(order[turn])
            while wanted not in held:
                position, picture = next(pictures)
                if turns[position] >= skipped:
                    held[position] = _Held(picture.number, picture.name, picture.read())
            return held[wanted]

        for turn in range(skipped, length):
            following = map(fetch, range(turn, turn + TRIES))
            candidates = ((each.name, partial(_content, each)) for each in following)
            key = f"{plan.seed}/{epoch}/{fetch(turn).number}"
            yield first_good(candidates, self._maker, key)
            del held[int(order[turn])]


def buffered_order(length: int, buffer: int, rng: np.random.Generator) -> Order:
    """The order in which a shuffle buffer gives out 0 to `length` - 1.

    It fills; each one that comes in then pushes out one drawn from those held; the rest leave
    shuffled. Nothing comes out more than `buffer` places before its own.
    """
    held = np.arange(min(buffer, length))
    order = np.empty(length, dtype=np.int64)
    draws = rng.integers(0, buffer, size=length - len(held))
    for turn, slot in enumerate(draws):
        order[turn] = held[slot]
        held[slot] = buffer + turn
    order[len(draws) :] = rng.permutation(held)
    return order


class _Picture(NamedTuple):
    number: int
    name: str
    read: Callable[[], bytes]


class _Held(NamedTuple):
    number: int
    name: str
    content: bytes


def _content(held: _Held) -> bytes:
    return held.content


class _Ring:
    """All pictures of an epoch, in its order of shards and from its beginning."""

    def __init__(self, shards: Shards, rng: np.random.Generator) -> None:
        self._shards = shards
        self._order = rng.permutation(len(shards.counts)).tolist()
        self._ends = list(accumulate(shards.counts[i] for i in self._order))
        self._first_numbers = [0, *accumulate(shards.counts)]
        self._beginning = int(rng.integers(shards.count))

    def walk(self, first: int, count: int) -> Iterator[_Picture]:
        """`count` pictures from the `first`, over the end to the beginning where it comes to that.

        A picture's bytes can be had until the next one is asked for.
        """
        first = (self._beginning + first) % self._shards.count
        turn = bisect_right(self._ends, first)
        skipped = first - (self._ends[turn - 1] if turn else 0)
        while count:
            shard = self._order[turn % len(self._order)]
            path, held = self._shards.paths[shard], self._shards.counts[shard]
            wanted = min(count, held - skipped)
            given = 0
            for i, (name, read) in islice(enumerate(read_shard(path)), skipped, skipped + wanted):
                yield _Picture(self._first_numbers[shard] + i, f"{path.name}/{name}", read)
                given += 1
            if given < wanted:
                raise DataError(f"{str(path)!r} holds fewer than the {held} pictures counted")
            count -= wanted
            turn, skipped = turn + 1, 0


def _turns(batches: int, lane: int, lanes: int) -> int:
    return len(range(lane, batches, lanes))
