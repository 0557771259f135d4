"""The batcher when the model fails, memory runs out, or time does."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest

from service.batcher import Batcher
from service.deadlines import DeadlineExceeded, WaitedTooLong
from service.jobs import BatcherClosed, BatchFailed, QueueFull
from service.trouble import PERSISTING
from tests.service.batches import start, until_idle
from tests.service.fakes import PATIENCE_S

pytestmark = pytest.mark.anyio


class Model:
    """Fails on batches that hold one of `poison`, or more than `fits`; waits at `gate`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.poison: set[int] = set()
        self.fits = 1000
        self.broken = False
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def run(self, kind: Hashable, items: Sequence[int], at_once: int) -> list[int]:
        self.batches.append(list(items))
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        if len(items) > self.fits:
            raise MemoryError
        if self.broken or self.poison & set(items):
            raise RuntimeError("no")
        return list(items)


@pytest.fixture
def model() -> Model:
    return Model()


def batcher_of(model: Model, **options: Any) -> Batcher[int, int]:
    given = {"max_batch": 16, "max_waiting": 100, **options}
    return Batcher(
        model.run, is_out_of_memory=lambda error: isinstance(error, MemoryError), **given
    )


async def gathered(batcher: Batcher[int, int], model: Model, items: int) -> list[Any]:
    """The results of that many requests that share a batch."""
    while model.entered.acquire(blocking=False):
        pass
    model.gate.clear()
    first = await start(batcher.submit("a", [-1]))
    assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)
    rest = await start(*(batcher.submit("a", [i]) for i in range(items)))
    model.gate.set()
    results = await asyncio.gather(*first, *rest, return_exceptions=True)
    model.batches.pop(0)
    return results[1:]


@pytest.mark.parametrize("poison", [{0}, {7}, {15}, {3, 4}])
async def test_poisonous_items_fail_alone(model: Model, poison: set[int]) -> None:
    batcher = batcher_of(model)
    model.poison = poison
    results = await gathered(batcher, model, 16)
    for i, result in enumerate(results):
        if i in poison:
            assert isinstance(result, BatchFailed)
            assert isinstance(result.__cause__, RuntimeError)
        else:
            assert result == [i]
    assert len(model.batches) <= 1 + 4 * 2 * len(poison)
    assert batcher.trouble is None
    batcher.close()


async def test_a_broken_model_is_not_asked_for_every_item(model: Model) -> None:
    batcher = batcher_of(model)
    model.broken = True
    results = await gathered(batcher, model, 16)
    assert all(isinstance(one, BatchFailed) for one in results)
    assert len(model.batches) < 20  # to try each alone takes 31
    batcher.close()


async def test_trouble_shows_and_ends_with_the_first_success(model: Model) -> None:
    batcher = batcher_of(model)
    model.broken = True
    for i in range(PERSISTING):
        assert batcher.trouble is None
        with pytest.raises(BatchFailed):
            await batcher.submit("a", [i])
    assert batcher.trouble == f"the model failed on the last {PERSISTING} batches: RuntimeError"
    model.batches.clear()
    with pytest.raises(BatchFailed):
        await batcher.submit("a", [1, 2])
    assert model.batches == [[1, 2]]  # halving helps no more
    model.broken = False
    assert await batcher.submit("a", [1]) == [1]
    assert batcher.trouble is None
    batcher.close()


async def test_batches_are_smaller_for_a_while_after_memory_ran_out(model: Model) -> None:
    batcher = batcher_of(model, caution_s=0.2)
    model.fits = 5
    assert await gathered(batcher, model, 16) == [[i] for i in range(16)]
    assert [len(batch) for batch in model.batches] == [16, 8, 4, 4, 8, 4, 4]
    assert batcher.batch_limit == 4
    model.batches.clear()
    assert await gathered(batcher, model, 8) == [[i] for i in range(8)]
    assert [len(batch) for batch in model.batches] == [4, 4]
    model.fits = 1000
    for limit in (8, 16):
        await asyncio.sleep(0.25)
        assert await batcher.submit("a", [1]) == [1]
        assert batcher.batch_limit == limit
    batcher.close()


async def test_batches_take_turns_for_a_while_after_memory_ran_out(model: Model) -> None:
    batcher = batcher_of(model, threads=2, caution_s=3600.0)
    model.fits = 1
    assert await batcher.submit("a", list(range(8))) == list(range(8))
    model.fits = 1000
    await until_idle(batcher)
    while model.entered.acquire(blocking=False):
        pass
    model.gate.clear()
    tasks = await start(batcher.submit("a", [1]), batcher.submit("a", [2]))
    assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)
    assert not await asyncio.to_thread(model.entered.acquire, timeout=0.05)
    model.gate.set()
    assert await asyncio.gather(*tasks) == [[1], [2]]
    batcher.close()


async def test_closing_finishes_what_waits_after_memory_ran_out(model: Model) -> None:
    batcher = batcher_of(model, threads=2, caution_s=3600.0)
    model.fits = 1
    assert await batcher.submit("a", [1, 2]) == [1, 2]
    await until_idle(batcher)
    while model.entered.acquire(blocking=False):
        pass
    model.gate.clear()
    tasks = await start(*(batcher.submit("a", [i]) for i in range(6)))
    assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)
    assert not batcher.close(timeout_s=0.05)
    model.gate.set()
    assert await asyncio.gather(*tasks) == [[i] for i in range(6)]
    assert batcher.close(timeout_s=PATIENCE_S)


async def test_failures_beside_each_other_are_one(model: Model) -> None:
    batcher = batcher_of(model, threads=4)
    model.broken = True
    model.gate.clear()
    tasks = await start(*(batcher.submit("a", [i]) for i in range(4)))
    for _ in range(4):
        assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)
    model.gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert batcher.trouble is None
    batcher.close()


async def test_memory_that_does_not_suffice_for_one(model: Model) -> None:
    batcher = batcher_of(model)
    model.fits = 0
    with pytest.raises(BatchFailed):
        await batcher.submit("a", [1])
    assert batcher.batch_limit == 1
    batcher.close()


async def test_an_error_keeps_no_batch_in_memory() -> None:
    kept: list[weakref.ref[Any]] = []

    def run(kind: Hashable, items: Sequence[int], at_once: int) -> list[int]:
        stacked = np.zeros(1000)
        kept.append(weakref.ref(stacked))
        raise MemoryError(len(stacked))

    batcher = Batcher[int, int](run, max_batch=4, max_waiting=10)
    with pytest.raises(BatchFailed) as caught:
        await batcher.submit("a", [1])
    gc.collect()
    assert caught.value.__cause__ is not None
    assert kept[0]() is None
    batcher.close()


async def test_a_thread_that_ends_fails_all_that_wait(model: Model) -> None:
    def run(kind: Hashable, items: Sequence[int], at_once: int) -> list[int]:
        model.run(kind, items, at_once)
        raise SystemExit(3)

    batcher = Batcher[int, int](run, max_batch=1, max_waiting=10)
    model.gate.clear()
    tasks = await start(batcher.submit("a", [1]), batcher.submit("a", [2]))
    assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)
    model.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in results] == [BatcherClosed, BatcherClosed]
    assert batcher.close(timeout_s=PATIENCE_S)
    assert not batcher.alive
    with pytest.raises(BatcherClosed):
        await batcher.submit("a", [3])


async def test_a_thread_that_ends_leaves_the_others_their_batch(model: Model) -> None:
    def run(kind: Hashable, items: Sequence[int], at_once: int) -> list[int]:
        if items == [2]:
            raise SystemExit(3)
        return model.run(kind, items, at_once)

    batcher = Batcher[int, int](run, max_batch=2, max_waiting=10, threads=2)
    model.gate.clear()
    good = await start(batcher.submit("a", [1]))
    assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)
    with pytest.raises(BatcherClosed):
        await batcher.submit("a", [2])
    with pytest.raises(BatcherClosed):
        await batcher.submit("a", [3])
    while batcher.alive:
        await asyncio.sleep(0.001)
    assert not batcher.close(timeout_s=0.01)
    model.gate.set()
    assert await asyncio.gather(*good) == [[1]]
    assert batcher.close(timeout_s=PATIENCE_S)


async def test_what_still_waits_at_its_deadline_leaves(model: Model) -> None:
    batcher = batcher_of(model, max_batch=1)
    model.gate.clear()
    deadline = time.monotonic() + 0.2
    tasks = await start(
        batcher.submit("a", [1], deadline=deadline),
        batcher.submit("a", [2], deadline=deadline),
        batcher.submit("a", [3], deadline=time.monotonic() + PATIENCE_S),
        batcher.submit("a", [4]),
    )
    running, waiting = await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert isinstance(running, DeadlineExceeded)
    assert isinstance(waiting, WaitedTooLong)
    assert waiting.retry_after_s >= 1
    assert batcher.waiting == 2
    model.gate.set()
    assert await asyncio.gather(*tasks[2:]) == [[3], [4]]
    assert model.batches == [[1], [3], [4]]
    batcher.close()


async def test_a_queue_that_is_too_long_for_the_deadline_is_told_at_once(model: Model) -> None:
    def run(kind: Hashable, items: Sequence[int], at_once: int) -> list[int]:
        time.sleep(0.1 * len(items))
        return model.run(kind, items, at_once)

    batcher = Batcher[int, int](run, max_batch=4, max_waiting=100)
    await batcher.submit("a", [0, 1])  # shows the rate: .1 s each
    model.gate.clear()
    tasks = await start(batcher.submit("a", [2]))
    while batcher.waiting:
        await asyncio.sleep(0.001)
    tasks += await start(batcher.submit("a", list(range(30))))
    with pytest.raises(QueueFull) as caught:
        await batcher.submit("a", [3], deadline=time.monotonic() + 1.0)
    assert caught.value.reason == "deadline"
    assert 2 <= caught.value.retry_after_s <= 60
    tasks += await start(batcher.submit("a", [4], deadline=time.monotonic() + PATIENCE_S))
    model.gate.set()
    await asyncio.gather(*tasks)
    batcher.close()


async def test_bytes_bound_the_queue_and_one_large_request_has_room(model: Model) -> None:
    batcher = batcher_of(model, max_waiting_bytes=10, size_of=lambda item: item)
    model.gate.clear()
    tasks = await start(batcher.submit("a", [1]))
    assert await asyncio.to_thread(model.entered.acquire, timeout=PATIENCE_S)
    tasks += await start(batcher.submit("a", [99]))  # nothing waits: it has the queue to itself
    assert batcher.waiting_bytes == 99
    with pytest.raises(QueueFull, match="10 bytes") as caught:
        await batcher.submit("a", [1])
    assert caught.value.reason == "queue_bytes"
    tasks[-1].cancel()
    await asyncio.gather(tasks.pop(), return_exceptions=True)
    assert batcher.waiting_bytes == 0
    tasks += await start(batcher.submit("a", [4, 6]))
    with pytest.raises(QueueFull):
        await batcher.submit("a", [1])
    model.gate.set()
    await asyncio.gather(*tasks)
    assert batcher.waiting_bytes == 0
    batcher.close()
