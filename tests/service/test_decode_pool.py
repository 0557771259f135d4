import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from service.decode_pool import DecodePool
from service.helper import Helper
from service.jobs import QueueFull
from service.settings import Settings
from tests.service.fakes import PATIENCE_S

pytestmark = pytest.mark.anyio


class Held:
    """Work that waits to be let go."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.done = 0

    def __call__(self) -> int:
        self.started.release()
        assert self.gate.wait(PATIENCE_S)
        self.done += 1
        return self.done


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def pool(held: Held) -> Iterator[DecodePool]:
    made = DecodePool(1, max_pictures=3, max_bytes=100)
    yield made
    held.gate.set()
    made.close()


async def test_more_than_the_most_pictures_are_refused(pool: DecodePool, held: Held) -> None:
    waiting = [asyncio.ensure_future(pool.run(held)) for _ in range(3)]
    await asyncio.to_thread(held.started.acquire)
    with pytest.raises(QueueFull, match="3 pictures") as caught:
        await pool.run(held)
    assert isinstance(caught.value, QueueFull)  # so it is answered 429
    assert caught.value.retry_after_s >= 1
    held.gate.set()
    assert await asyncio.gather(*waiting) == [1, 2, 3]
    assert pool.pictures == 0


async def test_more_than_the_most_bytes_are_refused(pool: DecodePool, held: Held) -> None:
    first = asyncio.ensure_future(pool.run(held, held_bytes=60))
    await asyncio.to_thread(held.started.acquire)
    with pytest.raises(QueueFull, match="100 bytes"):
        await pool.run(held, held_bytes=41)
    second = asyncio.ensure_future(pool.run(held, held_bytes=40))
    await asyncio.sleep(0)
    assert pool.held_bytes == 100
    held.gate.set()
    await asyncio.gather(first, second)
    assert pool.held_bytes == 0


async def test_who_leaves_frees_a_place_that_had_not_been_reached(
    pool: DecodePool, held: Held
) -> None:
    first, second = (asyncio.ensure_future(pool.run(held, held_bytes=50)) for _ in range(2))
    await asyncio.to_thread(held.started.acquire)
    for one in (first, second):
        one.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    # The first is being worked on, and holds its bytes until that ends.
    assert (pool.pictures, pool.held_bytes) == (1, 50)
    held.gate.set()
    assert await pool.run(held) == 2
    assert (pool.pictures, pool.held_bytes) == (0, 0)


async def test_an_error_is_the_callers_and_frees_its_place(pool: DecodePool) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await pool.run(fail, held_bytes=100)
    assert (pool.pictures, pool.held_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_decode_queue": 63}, "DINOSCOPE_MAX_DECODE_QUEUE = 63"),
        ({"max_decode_bytes": 1000}, "DINOSCOPE_MAX_DECODE_BYTES = 1000"),
        ({"cache_bytes": -1}, "cache_bytes"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Settings(_env_file=None, **settings)


async def test_work_that_is_lent_out_counts_here(pool: DecodePool, held: Held) -> None:
    lent: list[Any] = []

    def take(work: Any) -> bool:
        lent.append(work)
        return True

    done = pool.start(held, held_bytes=60, lend=take)
    assert (pool.pictures, pool.held_bytes) == (1, 60)
    held.gate.set()
    lent.pop()()
    assert await asyncio.wrap_future(done) == 1
    assert (pool.pictures, pool.held_bytes) == (0, 0)

    def fail() -> None:
        raise MemoryError("no")

    failing = pool.start(fail, lend=take)
    lent.pop()()
    with pytest.raises(MemoryError, match="no"):
        failing.result()
    given_up = pool.start(held, lend=take)
    assert given_up.cancel()
    assert pool.pictures == 0
    lent.pop()()
    assert held.done == 1  # nobody waits for a second time


async def test_only_work_that_is_alone_is_lent_out(pool: DecodePool, held: Held) -> None:
    first = asyncio.ensure_future(pool.run(held))
    await asyncio.to_thread(held.started.acquire)
    second = pool.start(held, lend=lambda _: pytest.fail("asked"))
    held.gate.set()
    assert sorted([await first, await asyncio.wrap_future(second)]) == [1, 2]


async def test_work_that_nobody_takes_is_done_here(pool: DecodePool, held: Held) -> None:
    held.gate.set()
    assert await asyncio.wrap_future(pool.start(held, lend=lambda _: False)) == 1


async def test_work_that_is_alone_has_two_threads(held: Held) -> None:
    pool = DecodePool(1, max_pictures=3, max_bytes=100, helper=Helper())
    has_begun = threading.Event()

    def one() -> str:
        has_begun.set()
        return threading.current_thread().name

    def other() -> str:
        assert has_begun.wait(PATIENCE_S)
        return threading.current_thread().name

    assert await pool.run(lambda: pool.both(one, other)) == ("helper_0", "decode_0")

    def when_let_go() -> tuple[str, str]:
        held()
        return pool.both(one, other)

    running = asyncio.ensure_future(pool.run(when_let_go))
    await asyncio.to_thread(held.started.acquire)
    waiting = asyncio.ensure_future(pool.run(has_begun.clear))
    await asyncio.sleep(0)
    held.gate.set()
    assert await running == ("decode_0", "decode_0")
    await waiting
    assert await pool.run(lambda: pool.both(one, other)) == ("helper_0", "decode_0")
    pool.close()
    assert pool._helper is not None
    assert not any(thread.is_alive() for thread in pool._helper._executor._threads)


async def test_without_a_helper_one_thread_does_both(pool: DecodePool) -> None:
    names = await pool.run(lambda: pool.both(threading.get_ident, threading.get_ident))
    assert names[0] == names[1]
