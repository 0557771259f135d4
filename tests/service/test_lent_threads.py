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


async def asked_by_itself(
    batcher: Batcher[int, Any], model: Model, work: Callable[[], None]
) -> tuple[bool, str]:
    """Whether the thread that computes an item does `work`, and that thread's name."""
    model.gate.clear()
    (job,) = batcher.put("a", [5])
    answers: list[bool] = []
    job.future.add_done_callback(lambda _: answers.append(batcher.lend(work)))
    await model.wait_until_busy()
    model.gate.set()
    assert await batcher.results([job]) == [("a", 5)]
    return answers[0], model.threads[-1]


async def test_a_thread_of_the_model_does_what_it_asks_for(make: Any, model: Model) -> None:
    batcher = make(threads=2)
    gate, doers = threading.Event(), list[str]()

    def work() -> None:
        assert gate.wait(PATIENCE_S)
        doers.append(threading.current_thread().name)

    for i in range(5):
        await until_idle(batcher)
        is_lent, thread = await asked_by_itself(batcher, model, work)
        assert is_lent
        assert not batcher.is_idle
        assert await batcher.submit("a", [1]) == [("a", 1)]  # by the other one
        assert model.threads[-1] == "model_1"
        gate.set()
        await until_idle(batcher)
        gate.clear()
        assert doers == [thread] * (i + 1) == ["model_0"] * (i + 1)


async def test_what_came_before_it_began_is_another_threads(make: Any, model: Model) -> None:
    batcher = make(threads=2, enough=9)
    gate = threading.Event()
    await until_idle(batcher)
    batcher.expect()
    model.gate.clear()
    (job,) = batcher.put("a", [0])
    others: list[Any] = []

    def ask(_: object) -> None:
        assert batcher.lend(lambda: gate.wait(PATIENCE_S) and None)
        others.extend(batcher.put("a", [1]))  # which waits while a batch runs, and one is expected

    job.future.add_done_callback(ask)
    await model.wait_until_busy()
    model.gate.set()
    await batcher.results([job])
    assert await batcher.results(others) == [("a", 1)]
    assert model.threads == ["model_0", "model_1"]
    gate.set()


@pytest.mark.parametrize("why", ["one thread", "none free", "waiting", "twice", "closed"])
async def test_it_does_not_do_it_where_others_may_need_it(
    make: Any, model: Model, why: str
) -> None:
    batcher = make(threads=1 if why == "one thread" else 2, enough=9)
    await until_idle(batcher)
    model.gate.clear()
    gate = threading.Event()
    if why == "none free":
        assert await put_by(batcher, lambda: gate.wait(PATIENCE_S) and None)
    (job,) = batcher.put("a", [5])
    answers: list[bool] = []
    done: list[int] = []

    def ask(_: object) -> None:
        if why == "waiting":
            batcher.expect()
            batcher.expect()
            batcher.put("a", [6])
        if why == "closed":
            threading.Thread(target=batcher.close).start()
            while not batcher._closed:
                pass
        answers.append(batcher.lend(lambda: done.append(1)))
        if why == "twice":
            answers.append(batcher.lend(lambda: done.append(2)))

    job.future.add_done_callback(ask)
    await model.wait_until_busy()
    model.gate.set()
    await batcher.results([job])
    gate.set()
    await until_idle(batcher)
    assert answers == ([True, False] if why == "twice" else [False])
    assert done == ([1] if why == "twice" else [])


async def test_what_a_thread_was_asked_for_is_done_though_it_dies(
    make: Any, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = make(threads=2)
    await until_idle(batcher)
    done = threading.Event()

    class Death(BaseException):
        pass

    def ask(_: object) -> None:
        assert batcher.lend(done.set)
        raise Death

    model.gate.clear()
    (job,) = batcher.put("a", [5])
    job.future.add_done_callback(ask)
    model.gate.set()
    assert await asyncio.to_thread(job.future.result, PATIENCE_S) == ("a", 5)
    assert await asyncio.to_thread(done.wait, PATIENCE_S)
    assert batcher.close(timeout_s=PATIENCE_S)
    assert "a thread of the model ended" in caplog.text
