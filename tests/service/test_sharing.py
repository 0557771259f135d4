"""Computations that are shared, and results that are kept."""

import asyncio
from collections.abc import Hashable, Sequence
from functools import partial

import numpy as np
import pytest

from service.deadlines import DeadlineExceeded, WaitedTooLong
from service.sharing import Array, Flights, InTask, ResultCache, shared

pytestmark = pytest.mark.anyio


class Work:
    """Doubles numbers, when it is let; records what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = asyncio.Event()
        self.cancelled = 0
        self.failure: Exception | None = None

    async def of(self, flights: Flights[int, int], *keys: int) -> list[int]:
        async def compute(chosen: Sequence[int]) -> list[int]:
            self.calls.append([keys[i] for i in chosen])
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            if self.failure is not None:
                raise self.failure
            return [2 * keys[i] for i in chosen]

        return await flights.share(keys, lambda chosen: InTask(compute(chosen)))


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def flights() -> Flights[int, int]:
    return Flights()


async def start(*waiters: "asyncio.Future[list[int]]") -> None:
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(waiter.done() for waiter in waiters)


async def test_what_is_under_way_is_computed_once(work: Work, flights: Flights[int, int]) -> None:
    first = asyncio.ensure_future(work.of(flights, 1, 2, 1))
    await start(first)
    second = asyncio.ensure_future(work.of(flights, 3, 2))
    await start(first, second)
    work.gate.set()
    assert await first == [2, 4, 2]
    assert await second == [6, 4]
    assert work.calls == [[1, 2], [3]]
    assert flights.joined == 2
    assert await work.of(flights, 2) == [4]  # what has ended is no longer shared
    assert work.calls[2:] == [[2]]


async def test_a_waiter_that_leaves_takes_nothing_from_others(
    work: Work, flights: Flights[int, int]
) -> None:
    first = asyncio.ensure_future(work.of(flights, 1))
    await start(first)
    second = asyncio.ensure_future(work.of(flights, 1))
    await start(first, second)
    first.cancel()
    await start(second)
    work.gate.set()
    assert await second == [2]
    assert (work.calls, work.cancelled) == ([[1]], 0)


async def test_when_the_last_one_leaves_the_work_ends(
    work: Work, flights: Flights[int, int]
) -> None:
    waiters = [asyncio.ensure_future(work.of(flights, 1)) for _ in range(2)]
    await start(*waiters)
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    later = asyncio.ensure_future(work.of(flights, 1))  # before the cancelled one has ended
    await start(later)
    work.gate.set()
    assert await later == [2]
    assert (work.calls, work.cancelled) == ([[1], [1]], 1)


async def test_who_leaves_several_at_once_leaves_them_all(
    work: Work, flights: Flights[int, int]
) -> None:
    first = asyncio.ensure_future(work.of(flights, 1))
    await start(first)
    second = asyncio.ensure_future(work.of(flights, 1, 2))
    await asyncio.sleep(0)  # it has begun, and nothing that it waits for has gone on
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert not first.done()
    third = asyncio.ensure_future(work.of(flights, 2))
    work.gate.set()
    assert (await first, await third) == ([2], [4])
    assert work.calls[0] == [1]
    assert work.calls[-1] == [2]
    assert flights._places == {}


async def test_work_that_cannot_begin_is_not_waited_for(flights: Flights[int, int]) -> None:
    def begin(_: Sequence[int]) -> InTask[int]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await flights.share([1], begin)
    assert flights._places == {}


async def test_a_failure_is_everybodys_and_is_not_kept(
    work: Work, flights: Flights[int, int]
) -> None:
    waiters = [asyncio.ensure_future(work.of(flights, 1)) for _ in range(2)]
    await start(*waiters)
    work.failure = ValueError("no")
    work.gate.set()
    errors = await asyncio.gather(*waiters, return_exceptions=True)
    assert [str(error) for error in errors] == ["no", "no"]
    work.failure = None
    assert await work.of(flights, 1) == [2]
    assert len(work.calls) == 2


async def test_who_comes_after_a_failure_starts_anew_while_others_still_hear_of_it(
    flights: Flights[int, int],
) -> None:
    gate = asyncio.Event()
    failing = InTask[int](fail_after(gate))
    first = asyncio.ensure_future(flights.share([1], lambda _: failing))
    second = asyncio.ensure_future(flights.share([1], lambda _: failing))
    await start(first, second)
    gate.set()
    while not failing.has_failed:
        await asyncio.sleep(0)
    assert not second.done()
    third = asyncio.ensure_future(flights.share([1], lambda _: InTask(give(3))))
    fourth = asyncio.ensure_future(flights.share([1], lambda _: InTask(give(4))))
    errors = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert (await third, await fourth) == ([3], [3])
    assert flights._places == {}


async def test_what_came_after_a_failure_may_end_before_all_have_heard_of_it(
    flights: Flights[int, int],
) -> None:
    gate = asyncio.Event()

    class Failed(InTask[int]):
        has_failed = False

    failed = Failed(fail_after(gate))
    first = asyncio.ensure_future(flights.share([1], lambda _: failed))
    await start(first)
    failed.has_failed = True
    assert await flights.share([1], lambda _: InTask(give(2))) == [2]
    gate.set()
    with pytest.raises(ValueError, match="no"):
        await first


async def fail_after(gate: asyncio.Event) -> list[int]:
    await gate.wait()
    raise ValueError("no")


async def give(value: int, after_s: float = 0.0) -> list[int]:
    await asyncio.sleep(after_s)
    return [value]


async def too_late() -> list[int]:
    await asyncio.sleep(0.01)
    raise DeadlineExceeded


async def test_a_deadline_of_the_first_ones_is_not_that_of_those_who_joined() -> None:
    flights = Flights[Hashable, int]()
    started: list[int] = []

    def start(number: int) -> InTask[int]:
        started.append(number)
        return InTask(too_late() if number == 0 else give(number, 0.01))

    async with asyncio.timeout(1.0):
        waiting = [
            asyncio.ensure_future(shared(flights, "key", partial(start, number), ""))
            for number in range(4)
        ]
        found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], DeadlineExceeded)
    assert len(started) == 2  # one of the others begins, all others join
    assert found[1:] == [started[1]] * 3


async def test_a_deadline_of_ones_own_is_told_though_a_timer_was_early() -> None:
    """uvloop's may be, by less than a tenth of a millisecond: then `is_late` says no."""
    flights = Flights[Hashable, int]()

    class Slow(InTask[int]):
        async def results(self) -> Sequence[int]:
            if started:  # who joins has less time
                raise WaitedTooLong(1)
            return await super().results()

    started: list[int] = []
    first = asyncio.ensure_future(shared(flights, "key", lambda: Slow(give(1, 0.01)), ""))
    await asyncio.sleep(0)
    started.append(1)
    with pytest.raises(WaitedTooLong):
        await shared(flights, "key", lambda: InTask(give(2)), "")
    assert await first == 1


def vector(value: float, length: int = 1000) -> Array:
    return np.full(length, value, dtype=np.float32)


def test_the_least_recently_used_goes_first() -> None:
    cache = ResultCache(15_000)  # three of 4,000 bytes, with what else they take
    for i in range(3):
        cache.put(i, vector(i))
    assert len(cache) == 3
    assert cache.get(0) is not None
    cache.put(3, vector(3))
    assert [i for i in range(4) if cache.peek(i) is not None] == [0, 2, 3]
    assert cache.get(1) is None
    assert (cache.hits, cache.misses, cache.evictions) == (1, 1, 1)
    assert 12_000 < cache.held_bytes <= 15_000


def test_a_kept_result_is_a_copy_that_nobody_changes() -> None:
    cache = ResultCache(10_000)
    batch = np.ones((100, 5), dtype=np.float32)
    cache.put("a", batch[1])
    batch[:] = 0.0
    kept = cache.get("a")
    assert kept is not None
    assert kept.tolist() == [1.0] * 5
    assert kept.base is None
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 2.0


def test_what_does_not_fit_is_not_kept() -> None:
    cache = ResultCache(4000)
    cache.put("small", vector(1.0, 10))
    cache.put("large", vector(1.0, 1000))
    assert len(cache) == 1
    assert cache.evictions == 0
    nothing = ResultCache(0)
    nothing.put("a", vector(1.0, 1))
    assert len(nothing) == nothing.held_bytes == 0
