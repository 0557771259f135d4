"""A picture that comes alone is decoded by a thread of the model, over HTTP."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from service.batcher import Batcher
from service.computing import Computation
from service.decode_pool import DecodePool
from service.encoder import Array
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import data_uri, png
from tests.service.test_same_pictures import vision_of

pytestmark = pytest.mark.anyio
URL = "/v1/embeddings"


class OnTwoCores(FakeEncoder):
    """Says which threads did what."""

    batches_at_once = 2

    def __init__(self) -> None:
        super().__init__()
        self.decoded_by: list[str] = []
        self.computed_by: list[str] = []

    def prepare(self, *args: Any, **options: Any) -> Array:
        self.decoded_by.append(threading.current_thread().name)
        return super().prepare(*args, **options)

    def run(self, *args: Any, **options: Any) -> list[Array]:
        self.computed_by.append(threading.current_thread().name)
        return super().run(*args, **options)


@pytest.fixture
def encoder() -> OnTwoCores:
    return OnTwoCores()


@pytest.fixture
async def client(serve: Serve, encoder: OnTwoCores) -> AsyncIterator[httpx.AsyncClient]:
    async with serve() as opened:
        await until_idle(opened)
        encoder.decoded_by.clear()
        encoder.computed_by.clear()
        yield opened


async def until_idle(client: httpx.AsyncClient) -> None:
    while len(vision_of(client).batcher._idle) < 2 or vision_of(client)._pool.pictures:
        await asyncio.sleep(0.001)


def ask(client: httpx.AsyncClient, seed: int) -> "asyncio.Future[httpx.Response]":
    return asyncio.ensure_future(client.post(URL, json={"input": data_uri(png(seed))}))


async def test_one_thread_does_both(client: httpx.AsyncClient, encoder: OnTwoCores) -> None:
    for seed in range(5):
        json_of(await ask(client, seed))
        await until_idle(client)
        assert not vision_of(client).batcher._expected
    assert encoder.decoded_by == encoder.computed_by == ["model_0"] * 5


async def test_who_comes_meanwhile_does_not_wait_for_it(
    client: httpx.AsyncClient, encoder: OnTwoCores
) -> None:
    with encoder.slow_decoding() as gate:
        first = ask(client, 1)
        await asyncio.to_thread(gate.wait_until_reached)
        second = ask(client, 2)  # in the pool, for not to take the last thread of the model
        while len(encoder.decoded_by) < 2:
            await asyncio.sleep(0.001)
        assert encoder.decoded_by[0] == "model_0"
        assert encoder.decoded_by[1].startswith("decode")
        assert not vision_of(client).batcher.is_idle
        small = np.zeros((3, 4, 4), dtype=np.float32)
        assert len(await vision_of(client).batcher.submit(("cls", small.shape), [small])) == 1
        assert encoder.computed_by == ["model_1"]
        gate.open()
        assert (await first).status_code == (await second).status_code == 200


@pytest.mark.parametrize("lone", [True, False])
async def test_a_client_that_leaves_costs_nothing_and_is_no_error(
    client: httpx.AsyncClient,
    encoder: OnTwoCores,
    lone: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with encoder.slow_decoding() as gate:
        others = [] if lone else [ask(client, 10)]
        leaving = ask(client, 11)
        while len(encoder.decoded_by) < 1 + len(others):
            await asyncio.sleep(0.001)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        gate.open()
        for other in others:
            json_of(await other)
    await until_idle(client)
    assert len(encoder.calls) == len(others)
    assert vision_of(client).batcher._expected == vision_of(client).batcher.waiting == 0
    assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == []


async def test_the_deadline_comes_while_it_is_decoded(serve: Serve, encoder: OnTwoCores) -> None:
    async with serve(deadline_seconds=0.3, raise_errors=False) as client:
        with encoder.slow_decoding() as gate:
            error_of(await ask(client, 1), 503, "deadline_exceeded")
            gate.open()
        await until_idle(client)
        json_of(await ask(client, 1))


async def test_what_nobody_waits_for_does_not_begin() -> None:
    pool = DecodePool(1, max_pictures=2, max_bytes=2)
    batcher = Batcher[Array, Array](lambda *_: [], max_batch=1, max_waiting=1)
    gate, decoded = threading.Event(), list[int]()

    def decode() -> Any:
        decoded.append(1)

    try:
        before = pool.start(gate.wait)
        computing = Computation(decode, "cls", pool=pool, batcher=batcher, held_bytes=1)
        waiting = asyncio.ensure_future(computing.results())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert batcher._expected == 1  # others may wait for it
        computing.abandon()
        gate.set()
        assert before.result()
        await pool.run(lambda: None)
    finally:
        gate.set()
        pool.close()
        batcher.close()
    assert (decoded, batcher._expected, pool.held_bytes) == ([], 0, 0)
