"""A map goes from decoding through the model to where it is drawn, over HTTP."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service import heatmaps
from service.jobs import QueueFull
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import PATIENCE_S
from tests.service.pictures import data_uri, encoded, png
from tests.service.test_lone_pictures import OnTwoCores, until_idle
from tests.service.test_same_pictures import until_joined, vision_of

pytestmark = pytest.mark.anyio
URL = "/v1/attention"


@pytest.fixture
def encoder() -> OnTwoCores:
    return OnTwoCores()


class Drawing:
    """Notes who draws, and may hold them."""

    def __init__(self) -> None:
        self.by: list[str] = []
        self.gate = threading.Event()
        self.gate.set()


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawing]:
    noted, draw = Drawing(), heatmaps.draw

    def noting(*args: Any, **options: Any) -> bytes:
        noted.by.append(threading.current_thread().name.rpartition("_")[0])
        assert noted.gate.wait(PATIENCE_S)
        return draw(*args, **options)

    monkeypatch.setattr(heatmaps, "draw", noting)
    yield noted
    noted.gate.set()


@pytest.fixture
async def client(
    serve: Serve, encoder: OnTwoCores, drawing: Drawing
) -> AsyncIterator[httpx.AsyncClient]:
    async with serve() as opened:
        await until_idle(opened)
        encoder.decoded_by.clear()
        encoder.computed_by.clear()
        yield opened


def ask(client: httpx.AsyncClient, seed: int, **options: Any) -> "asyncio.Future[httpx.Response]":
    body = {"image": data_uri(png(seed)), **options}
    return asyncio.ensure_future(client.post(URL, json=body))


@asynccontextmanager
async def two_asking(
    client: httpx.AsyncClient, encoder: OnTwoCores, first: dict[str, Any], second: dict[str, Any]
) -> AsyncIterator[list["asyncio.Future[httpx.Response]"]]:
    """Both ask for the same picture's map; inside the block it is being computed for the first."""
    with encoder.busy() as gate:
        asking = [ask(client, 1, **first)]
        await asyncio.to_thread(gate.wait_until_reached)
        asking.append(ask(client, 1, **second))
        await until_joined(client, 1)
        yield asking


async def until_drawing(drawing: Drawing, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(drawing.by) < count:
            await asyncio.sleep(0.001)


def picture_of(response: httpx.Response) -> bytes:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    return response.content


async def test_one_thread_does_all(
    client: httpx.AsyncClient, encoder: OnTwoCores, drawing: Drawing
) -> None:
    found = []
    for seed in range(3):
        found.append(picture_of(await ask(client, seed)))
        await until_idle(client)
    assert encoder.decoded_by == encoder.computed_by == ["model_0"] * 3
    assert drawing.by == ["model"] * 3
    again = [picture_of(await ask(client, seed)) for seed in range(3)]
    assert again == found
    assert drawing.by == ["model"] * 3 + ["decode"] * 3  # the maps were kept
    assert len(encoder.calls) == 3


async def test_who_comes_while_it_is_drawn_does_not_wait_for_it(
    client: httpx.AsyncClient, encoder: OnTwoCores, drawing: Drawing
) -> None:
    drawing.gate.clear()
    first = ask(client, 1)
    await until_drawing(drawing, 1)
    body = {"input": data_uri(png(2))}
    json_of(await asyncio.wait_for(client.post("/v1/embeddings", json=body), PATIENCE_S))
    assert encoder.computed_by == ["model_0", "model_1"]
    second = ask(client, 3)
    await until_drawing(drawing, 2)
    assert drawing.by == ["model", "decode"]
    drawing.gate.set()
    assert picture_of(await first) != picture_of(await second)


async def test_the_same_picture_is_computed_once_and_drawn_as_each_wants_it(
    client: httpx.AsyncClient, encoder: OnTwoCores
) -> None:
    with encoder.busy() as gate:
        first = ask(client, 1)
        await asyncio.to_thread(gate.wait_until_reached)
        others = [ask(client, 1, colormap="gray"), ask(client, 1, size=20), ask(client, 1)]
        await until_joined(client, 3)
        gate.open()
        pictures = [picture_of(await one) for one in (first, *others)]
    assert len(encoder.calls) == 1
    assert pictures[0] == pictures[3]
    assert len(set(pictures)) == 3


async def test_what_cannot_be_drawn_is_told_to_who_asked_alone(
    client: httpx.AsyncClient, encoder: OnTwoCores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heatmaps, "_WEBP_SIDE", 30)
    too_large = {"head": "all", "format": "webp", "size": 25}
    async with two_asking(client, encoder, too_large, {"size": 20}) as (large, small):
        pass
    error_of(await large, 400, "picture_too_large")
    picture_of(await small)
    await until_idle(client)


async def test_the_picture_is_the_same_when_its_map_was_kept(
    client: httpx.AsyncClient, encoder: OnTwoCores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "needed", lambda task, size: (330, 250))
    pixels = np.random.default_rng(0).integers(256, size=(750, 1000, 3)).astype(np.uint8)
    body = {"image": data_uri(encoded(Image.fromarray(pixels), "JPEG")), "size": 100}
    with encoder.busy() as gate:
        first = asyncio.ensure_future(client.post(URL, json=body))
        await asyncio.to_thread(gate.wait_until_reached)
        joined = asyncio.ensure_future(client.post(URL, json=body))
        await until_joined(client, 1)
        gate.open()
    kept = await client.post(URL, json=body)
    assert picture_of(await first) == picture_of(await joined) == picture_of(kept)


@pytest.mark.parametrize("lack", ["place", "threads"])
async def test_it_may_not_be_drawn_now(
    serve: Serve, encoder: OnTwoCores, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    async with serve(raise_errors=False) as client:
        await until_idle(client)
        pool, decoded = vision_of(client)._pool, list[int]()
        start = pool.start

        def lacking(work: Any, *args: Any, **options: Any) -> Any:
            if options.get("held_bytes"):
                decoded.append(1)
                return start(work, *args, **options)
            if lack == "threads":
                raise RuntimeError("can't start new thread")
            raise QueueFull("no place", reason="queue_full", retry_after_s=7)

        monkeypatch.setattr(pool, "start", lacking)
        answer = await asyncio.wait_for(ask(client, 1), PATIENCE_S)
        if lack == "place":
            error_of(answer, 429)
            assert answer.headers["retry-after"] == "7"
        else:
            error_of(answer, 500)
        assert decoded == [1]
        monkeypatch.undo()
        await until_idle(client)
        picture_of(await ask(client, 1))


async def test_who_shares_the_map_does_not_wait_for_anothers_drawing(
    client: httpx.AsyncClient, encoder: OnTwoCores, drawing: Drawing
) -> None:
    drawing.gate.clear()
    async with two_asking(client, encoder, {}, {"format": "json"}) as (leader, follower):
        pass
    assert json_of(await asyncio.wait_for(follower, PATIENCE_S))["maps"]
    assert not leader.done()
    drawing.gate.set()
    picture_of(await leader)


async def test_nothing_is_drawn_for_a_leader_who_left_its_followers(
    client: httpx.AsyncClient, encoder: OnTwoCores, drawing: Drawing
) -> None:
    async with two_asking(client, encoder, {}, {"format": "json"}) as (leader, follower):
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
    json_of(await follower)
    await until_idle(client)
    assert drawing.by == []
    assert len(encoder.calls) == 1


async def test_a_client_that_leaves_while_it_is_drawn_is_no_error(
    client: httpx.AsyncClient, drawing: Drawing, caplog: pytest.LogCaptureFixture
) -> None:
    drawing.gate.clear()
    leaving = ask(client, 1)
    await until_drawing(drawing, 1)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    drawing.gate.set()
    await until_idle(client)
    assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == []
    picture_of(await ask(client, 2))


async def test_the_deadline_comes_while_it_is_drawn(
    serve: Serve, encoder: OnTwoCores, drawing: Drawing
) -> None:
    async with serve(deadline_seconds=0.3, raise_errors=False) as client:
        drawing.gate.clear()
        error_of(await ask(client, 1), 503, "deadline_exceeded")
        drawing.gate.set()
        await until_idle(client)
        picture_of(await ask(client, 1))
        assert len(encoder.calls) == 1  # its map was kept


async def test_the_deadline_comes_before_it_is_drawn(
    serve: Serve, encoder: OnTwoCores, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(deadline_seconds=0.3, raise_errors=False) as client:
        await until_idle(client)
        pool, waiting = vision_of(client)._pool, Future[Any]()
        start = pool.start

        def queueing(work: Any, **options: Any) -> Any:
            return start(work, **options) if options.get("held_bytes") else waiting

        monkeypatch.setattr(pool, "start", queueing)
        answer = await ask(client, 1)
        error_of(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        assert waiting.cancelled()


async def test_nothing_is_drawn_for_who_left_before_it_began(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = vision_of(client)._pool
    start, queued = pool.start, list[Future[Any]]()

    def queueing(work: Any, **options: Any) -> Any:
        if options.get("held_bytes"):
            return start(work, **options)
        queued.append(Future())
        return queued[-1]

    monkeypatch.setattr(pool, "start", queueing)
    leaving = ask(client, 1)
    async with asyncio.timeout(PATIENCE_S):
        while not queued:
            await asyncio.sleep(0.001)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await until_idle(client)
    assert [one.cancelled() for one in queued] == [True]
