"""A lone picture is decoded by the thread that then embeds it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.batcher import Batcher
from service.jobs import BatcherClosed
from tests.service.batches import Model, batchers_of, start, until_idle
from tests.service.fakes import PATIENCE_S

pytestmark = pytest.mark.anyio


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def make(model: Model) -> Iterator[Callable[..., Batcher[int, Any]]]:
    with batchers_of(model) as make_one:
        yield make_one


async def put_by(batcher: Batcher[int, Any], work: Callable[[], None]) -> bool:
    over = batcher.expect()

    def both() -> None:
        work()
        over()

    is_lent = batcher.lend(both)
    if not is_lent:
        over()
    return is_lent


async def test_what_a_lent_thread_puts_is_its_next_batch(make: Any, model: Model) -> None:
    batcher = make(threads=2)
    doers: list[str] = []
    jobs: list[Any] = []
    batcher._turns[1].notify = lambda: pytest.fail("the other thread was woken")

    def work() -> None:
        doers.append(threading.current_thread().name)
        jobs.extend(batcher.put("a", [len(jobs)]))

    for i in range(20):
        await until_idle(batcher)
        assert await put_by(batcher, work)
        while len(jobs) == i:
            await asyncio.sleep(0)
        assert await batcher.results(jobs[-1:]) == [("a", i)]
    del batcher._turns[1].notify
    assert doers == ["model_0"] * 20
    assert model.threads == doers
    assert model.at_once == [1] * 20


async def test_after_it_was_lent_a_thread_wakes_others_again(make: Any, model: Model) -> None:
    batcher = make(threads=3)
    await until_idle(batcher)
    assert await put_by(batcher, lambda: None)
    await until_idle(batcher)
    model.gate.clear()
    (task,) = await start(batcher.submit("a", [1, 2, 3]))
    for _ in range(3):
        await model.wait_until_busy()  # each thread has one, and woke the next
    model.gate.set()
    await task


async def test_a_lent_thread_takes_what_came_meanwhile_along(make: Any, model: Model) -> None:
    batcher = make(threads=2, enough=8)
    gate, jobs = threading.Event(), []

    def work() -> None:
        gate.wait(PATIENCE_S)
        jobs.extend(batcher.put("a", [0]))

    await until_idle(batcher)
    assert await put_by(batcher, work)
    model.gate.clear()
    others = await start(batcher.submit("a", [1]))
    await model.wait_until_busy()  # the other thread is
    others += await start(batcher.submit("a", [2]))
    gate.set()
    await model.wait_until_busy()
    model.gate.set()
    await asyncio.gather(*others)
    assert await batcher.results(jobs) == [("a", 0)]
    assert model.batches == [("a", [1]), ("a", [2, 0])]
    assert model.threads == ["model_1", "model_0"]


@pytest.mark.parametrize("why", ["one thread", "one free", "no core", "waiting", "closed"])
async def test_no_thread_is_lent(make: Any, model: Model, why: str) -> None:
    batcher = make(threads=1 if why == "one thread" else 2, enough=9)
    while len(batcher._idle) < len(batcher._threads):
        await asyncio.sleep(0)
    tasks: list[Any] = []
    model.gate.clear()
    if why == "no core":
        batcher.expect()
        batcher.expect()
    if why in ("one free", "waiting"):
        tasks += await start(batcher.submit("a", [0]))
        await model.wait_until_busy()
    if why == "waiting":
        batcher.expect()
        tasks += await start(batcher.submit("a", [1]))
        assert batcher.waiting == 1
    if why == "closed":
        assert batcher.close(timeout_s=PATIENCE_S)
    assert not await put_by(batcher, lambda: pytest.fail("it was done"))
    model.gate.set()
    await asyncio.gather(*tasks)


async def test_a_thread_that_is_lent_is_finished_before_the_batcher_closes(make: Any) -> None:
    batcher = make(threads=2)
    gate, refused = threading.Event(), threading.Event()

    def work() -> None:
        gate.wait(PATIENCE_S)
        with pytest.raises(BatcherClosed):
            batcher.put("a", [0])
        refused.set()

    await until_idle(batcher)
    assert await put_by(batcher, work)
    assert not batcher.close(timeout_s=0.05)
    gate.set()
    assert batcher.close(timeout_s=PATIENCE_S)
    assert refused.is_set()
