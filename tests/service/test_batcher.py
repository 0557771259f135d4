import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.batcher import Batcher
from service.jobs import BatcherClosed, BatchFailed, QueueFull
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


async def test_a_lone_request_waits_for_nobody(make: Any, model: Model) -> None:
    assert await make().submit("a", [3, 1, 2]) == [("a", 3), ("a", 1), ("a", 2)]
    assert model.batches == [("a", [3, 1, 2])]
    assert await make().submit("a", []) == []


async def test_what_gathers_while_the_model_is_busy_shares_a_call(make: Any, model: Model) -> None:
    batcher = make(max_batch=4)
    model.gate.clear()
    first = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()
    others = await start(*(batcher.submit("a", [i, -i - 10]) for i in range(1, 4)))
    model.gate.set()
    results = await asyncio.gather(*first, *others)
    assert results == [[("a", 0)], *([("a", i), ("a", -i - 10)] for i in range(1, 4))]
    assert model.batches == [("a", [0]), ("a", [1, -11, 2, -12]), ("a", [3, -13])]


async def test_threads_that_are_free_share_what_waits(make: Any, model: Model) -> None:
    model.gate.clear()
    batcher = make(threads=3, enough=8)
    (task,) = await start(batcher.submit("a", list(range(7))))
    for _ in range(3):
        await model.wait_until_busy()
    model.gate.set()
    assert await task == [("a", i) for i in range(7)]
    assert sorted(items for _, items in model.batches) == [[0, 1, 2], [3, 4], [5, 6]]
    assert model.at_once == [3, 3, 3]


@pytest.mark.parametrize(("max_batch", "enough", "most"), [(5, 1, 3), (5, 4, 4), (3, 4, 3)])
async def test_the_largest_batch_is_shared_as_well(
    make: Any, model: Model, max_batch: int, enough: int, most: int
) -> None:
    batcher = make(max_batch=max_batch, threads=2, enough=enough)
    assert batcher.batch_limit == max_batch
    assert await batcher.submit("a", list(range(12))) == [("a", i) for i in range(12)]
    assert max(len(items) for _, items in model.batches) <= most


async def test_a_lone_item_waits_for_nobody_who_is_expected(make: Any, model: Model) -> None:
    batcher = make(threads=3, enough=3)
    await until_idle(batcher)
    assert await batcher.submit("a", [1]) == [("a", 1)]
    await until_idle(batcher)
    batcher.expect()
    assert await batcher.submit("a", [1]) == [("a", 1)]
    await until_idle(batcher)
    for _ in range(4):
        batcher.expect()
    assert await batcher.submit("a", [1]) == [("a", 1)]
    assert model.at_once == [1, 2, 3]  # who is expected has a core of its own already


async def test_the_first_thread_alone_has_all_cores(make: Any, model: Model) -> None:
    batcher = make(threads=3)
    await until_idle(batcher)
    model.gate.clear()
    tasks = []
    for i in range(2):
        tasks += await start(batcher.submit("a", [i]))
        await model.wait_until_busy()
    batcher._running.pop(0)  # as if the first batch ended just when the next one begins
    tasks += await start(batcher.submit("a", [2]))
    await model.wait_until_busy()
    model.gate.set()
    await asyncio.gather(*tasks)
    assert model.threads == ["model_0", "model_1", "model_2"]
    assert model.at_once == [1, 2, 2]


@pytest.mark.parametrize("event", ["enough", "came", "a free core", "free", "closed"])
async def test_a_second_batch_waits_for_what_is_expected(
    make: Any, model: Model, event: str
) -> None:
    batcher = make(threads=3 if event == "a free core" else 2, enough=3)
    model.gate.clear()
    tasks = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()
    has_come, others_have_come = batcher.expect(), batcher.expect()
    if event == "came":
        others_have_come()
    tasks += await start(batcher.submit("a", [1, 2]))
    assert not await asyncio.to_thread(model.entered.acquire, timeout=0.05)
    assert batcher.waiting == 2
    expected = [[0], [1, 2]]
    match event:
        case "enough":
            tasks += await start(batcher.submit("a", [3]))
            expected = [[0], [1, 2, 3]]
        case "came":
            has_come()
            has_come()  # which changes nothing
        case "a free core":
            others_have_come()
        case "free":
            model.gate.set()
        case "closed":
            threading.Thread(target=batcher.close).start()
    await model.wait_until_busy()
    model.gate.set()
    await asyncio.gather(*tasks)
    assert [items for _, items in model.batches] == expected
    await until_idle(batcher)
    assert batcher.busy_s == 0.0


async def test_a_request_is_not_shared_among_threads_whose_cores_are_taken(
    make: Any, model: Model
) -> None:
    batcher = make(threads=2, enough=8)
    await until_idle(batcher)
    over = batcher.expect()
    await batcher.submit("a", [1, 2, 3, 4])
    over()
    await until_idle(batcher)
    model.entered.acquire()
    model.gate.clear()
    (task,) = await start(batcher.submit("a", [1, 2, 3, 4]))
    await model.wait_until_busy()
    await model.wait_until_busy()
    model.gate.set()
    await task
    assert [len(items) for _, items in model.batches] == [4, 2, 2]


async def test_more_than_enough_is_left_to_the_next_free_thread(make: Any, model: Model) -> None:
    batcher = make(max_batch=20, threads=2, enough=3)
    model.gate.clear()
    tasks = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()
    over = batcher.expect()
    tasks += await start(batcher.submit("a", list(range(1, 10))))
    await model.wait_until_busy()
    over()
    model.gate.set()
    await asyncio.gather(*tasks)
    assert [len(items) for _, items in model.batches[:2]] == [1, 5]


async def test_the_first_thread_that_is_free_is_the_one_that_works(make: Any, model: Model) -> None:
    batcher = make(threads=3)
    await until_idle(batcher)
    for i in range(9):
        await batcher.submit("a", [i])
        await until_idle(batcher)
    assert set(model.threads) == {"model_0"}
    model.gate.clear()
    tasks = []
    for i in range(2):
        tasks += await start(batcher.submit("a", [i]))
        await model.wait_until_busy()
    model.gate.set()
    await asyncio.gather(*tasks)
    assert set(model.threads) <= {"model_0", "model_1"}


async def test_how_long_the_oldest_batch_takes(make: Any, model: Model) -> None:
    batcher = make(threads=2)
    model.gate.clear()
    tasks = await start(batcher.submit("a", [1]))
    await model.wait_until_busy()
    await asyncio.sleep(0.05)
    tasks += await start(batcher.submit("a", [2]))
    await model.wait_until_busy()
    assert batcher.busy_s >= 0.05
    assert not batcher.is_idle
    model.gate.set()
    await asyncio.gather(*tasks)


async def test_what_was_given_up_holds_nobody_up(make: Any, model: Model) -> None:
    """Futures that were cancelled may stand in the queue for a moment."""
    batcher = make()
    model.gate.clear()
    (first,) = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()
    for job in batcher.put("b", [1, 2, 3]):
        assert job.future.cancel()
    model.gate.set()
    await first
    await asyncio.wait_for(batcher.submit("b", [4]), PATIENCE_S)
    assert model.batches == [("a", [0]), ("b", [4])]
    assert batcher.waiting == 0


async def test_kinds_never_mix_and_the_oldest_goes_first(make: Any, model: Model) -> None:
    batcher = make()
    model.gate.clear()
    tasks = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()
    tasks += await start(
        batcher.submit("b", [1]), batcher.submit("a", [2]), batcher.submit("b", [3])
    )
    model.gate.set()
    assert await asyncio.gather(*tasks) == [[("a", 0)], [("b", 1)], [("a", 2)], [("b", 3)]]
    assert model.batches == [("a", [0]), ("b", [1, 3]), ("a", [2])]


@pytest.mark.parametrize("poison", [-1, -2])  # an error; a result too few
async def test_failure_reaches_its_own_batch_alone(make: Any, model: Model, poison: int) -> None:
    batcher = make(max_batch=2)
    model.gate.clear()
    tasks = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()
    tasks += await start(
        batcher.submit("a", [1, poison]), batcher.submit("b", [2]), batcher.submit("a", [3])
    )
    model.gate.set()
    good, bad, other, later = await asyncio.gather(*tasks, return_exceptions=True)
    assert (good, other, later) == ([("a", 0)], [("b", 2)], [("a", 3)])
    assert isinstance(bad, BatchFailed)
    assert isinstance(bad.__cause__, RuntimeError if poison == -1 else ValueError)
    assert batcher.alive
    assert await batcher.submit("a", [4]) == [("a", 4)]


async def test_a_request_takes_all_its_places_or_none(make: Any, model: Model) -> None:
    batcher = make(max_waiting=3)
    model.gate.clear()
    tasks = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()  # what runs takes no place
    tasks += await start(batcher.submit("a", [1, 2]))
    with pytest.raises(QueueFull, match="3 pictures") as caught:
        await batcher.submit("a", [3, 4])
    assert caught.value.retry_after_s >= 1
    tasks += await start(batcher.submit("a", [5]))
    with pytest.raises(QueueFull):
        await batcher.submit("b", [6])
    model.gate.set()
    await asyncio.gather(*tasks)
    assert model.batches == [("a", [0]), ("a", [1, 2, 5])]


async def test_a_cancelled_request_frees_its_places_at_once(make: Any, model: Model) -> None:
    batcher = make(max_waiting=2)
    model.gate.clear()
    (running,) = await start(batcher.submit("a", [0]))
    await model.wait_until_busy()
    (waiting,) = await start(batcher.submit("a", [1, 2]))
    running.cancel()  # too late for the model, which must not stumble over it
    waiting.cancel()
    assert [type(r) for r in await asyncio.gather(running, waiting, return_exceptions=True)] == [
        asyncio.CancelledError
    ] * 2
    (later,) = await start(batcher.submit("a", [3, 4]))
    model.gate.set()
    assert await later == [("a", 3), ("a", 4)]
    assert model.batches == [("a", [0]), ("a", [3, 4])]


async def test_closing_finishes_what_waits_and_refuses_what_comes(make: Any, model: Model) -> None:
    batcher = make(max_batch=1)
    model.gate.clear()
    tasks = await start(
        batcher.submit("a", [0]), batcher.submit("a", [1]), batcher.submit("b", [2])
    )
    await model.wait_until_busy()
    closing = asyncio.ensure_future(asyncio.to_thread(batcher.close))
    while not batcher._closed:
        await asyncio.sleep(0)
    with pytest.raises(BatcherClosed):
        await batcher.submit("a", [3])
    assert not closing.done()
    model.gate.set()
    assert await asyncio.gather(*tasks) == [[("a", 0)], [("a", 1)], [("b", 2)]]
    await closing
    assert not batcher.alive
    with pytest.raises(BatcherClosed):
        await batcher.submit("a", [4])


async def test_callers_in_many_loops(make: Any, model: Model) -> None:
    batcher = make(max_batch=5)

    def work(number: int) -> list[list[Any]]:
        async def ask() -> list[list[Any]]:
            items = [[number, number * 10 + i] for i in range(5)]
            return await asyncio.gather(*(batcher.submit(number % 2, one) for one in items))

        return asyncio.run(ask())

    answers = await asyncio.gather(*(asyncio.to_thread(work, n) for n in range(1, 9)))
    for number, answer in enumerate(answers, 1):
        assert answer == [[(number % 2, number), (number % 2, number * 10 + i)] for i in range(5)]
    assert sum(len(items) for _, items in model.batches) == 8 * 5 * 2
    assert max(len(items) for _, items in model.batches) <= 5
