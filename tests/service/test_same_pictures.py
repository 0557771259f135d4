"""Pictures that come twice are decoded and computed once, over HTTP."""

import asyncio
from typing import Any

import httpx
import pytest

from service.vision import Vision
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import PATIENCE_S, FakeEncoder
from tests.service.pictures import data_uri, png

pytestmark = pytest.mark.anyio
URL = "/v1/embeddings"


def body(*seeds: int) -> dict[str, list[str]]:
    return {"input": [data_uri(png(seed)) for seed in seeds]}


def vision_of(client: httpx.AsyncClient) -> Vision:
    transport: Any = client._transport
    vision: Vision = transport.app.state.lifecycle.services.models.loaded[0]
    return vision


async def until_joined(client: httpx.AsyncClient, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while vision_of(client).joined < count:
            await asyncio.sleep(0.001)


async def test_a_picture_that_comes_again_is_not_computed_again(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    first = json_of(await client.post(URL, json=body(1, 2)))
    again = json_of(await client.post(URL, json=body(2, 1)))
    assert encoder.calls == [("cls", 2)]
    assert [one["embedding"] for one in again["data"]] == [
        one["embedding"] for one in reversed(first["data"])
    ]
    cache = vision_of(client).cache
    assert (cache.hits, cache.misses, len(cache)) == (2, 2, 2)
    json_of(await client.post(URL, json={**body(1), "feature": "copy"}))
    assert encoder.calls[1:] == [("copy", 1)]


async def test_uploads_and_searches_share_results(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    picture = {"image": ("a.png", png(1))}
    json_of(await client.post("/v1/collections/default/images", files=picture))
    assert sorted(encoder.calls) == [("cls", 1), ("copy", 1)]
    json_of(await client.post(URL, files=picture))
    json_of(await client.post("/v1/collections/default/search", files=picture))
    json_of(await client.post("/v1/collections/default/copies", files=picture))
    data = {"id": "another"}
    json_of(await client.post("/v1/collections/default/images", files=picture, data=data))
    assert len(encoder.calls) == 2


async def test_maps_are_kept_and_the_picture_is_drawn_again(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    picture = {"image": ("a.png", png(1))}
    first = await client.post("/v1/attention", files=picture)
    again = await client.post("/v1/attention", files=picture)
    assert first.content == again.content
    other = await client.post("/v1/attention?colormap=gray", files=picture)
    assert other.content != first.content
    assert [(str(task), count) for task, count in encoder.calls] == [("attention", 1)]


async def test_no_cache(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(cache_bytes=0) as client:
        for _ in range(2):
            json_of(await client.post(URL, json=body(1)))
    assert encoder.calls == [("cls", 1)] * 2


async def test_equal_pictures_under_way_are_computed_once_whoever_leaves(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    with encoder.busy() as model:
        first = asyncio.ensure_future(client.post(URL, json=body(1)))
        await asyncio.to_thread(model.wait_until_reached)
        second = asyncio.ensure_future(client.post(URL, json=body(1, 1)))
        await until_joined(client, 2)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        model.open()
        vectors = json_of(await second)["data"]
    assert vectors[0]["embedding"] == vectors[1]["embedding"]
    assert encoder.calls == [("cls", 1)]


async def test_a_failure_of_the_model_is_not_kept(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(raise_errors=False) as client:
        encoder.failure = RuntimeError("no")
        error_of(await client.post(URL, json=body(1)), 503)
        encoder.failure = None
        json_of(await client.post(URL, json=body(1)))


async def test_each_request_hears_where_its_own_bad_picture_stood(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    bad = data_uri(png(1)[:60])
    with encoder.slow_decoding() as gate:
        good = asyncio.ensure_future(client.post(URL, json=body(9)))
        await asyncio.to_thread(gate.wait_until_reached)
        requests = [
            asyncio.ensure_future(client.post(URL, json={"input": [*body(2, 3)["input"][:i], bad]}))
            for i in range(3)
        ]
        await asyncio.sleep(0.05)
        gate.open()
        json_of(await good)
        for i, request in enumerate(requests):
            error = error_of(await request, 400, "invalid_image")
            assert error["param"] == f"input[{i}]"
            assert f"input[{i}]" in error["message"]


async def test_too_many_pictures_to_decode(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(max_decode_queue=2, max_request_images=2, decode_threads=1) as client:
        with encoder.slow_decoding() as gate:
            waiting = asyncio.ensure_future(client.post(URL, json=body(1, 2)))
            await asyncio.to_thread(gate.wait_until_reached)
            refused = await client.post(URL, json=body(3))
            assert "decoded" in error_of(refused, 429, "queue_full")["message"]
            assert int(refused.headers["retry-after"]) >= 1
            gate.open()
            json_of(await waiting)
        json_of(await client.post(URL, json=body(3)))


async def leave_while_decoding(
    client: httpx.AsyncClient, encoder: FakeEncoder, *, seed: int
) -> None:
    with encoder.slow_decoding() as gate:
        asked = asyncio.create_task(client.post(URL, json=body(seed)))
        await asyncio.to_thread(gate.wait_until_reached)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        gate.open()


async def test_a_client_that_leaves_while_its_picture_is_decoded_costs_the_model_nothing(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    batcher = vision_of(client).batcher
    await leave_while_decoding(client, encoder, seed=1)
    json_of(await client.post(URL, json=body(2)))
    assert encoder.calls == [("cls", 1)]
    assert batcher.waiting == 0


@pytest.mark.parametrize(("path", "field"), [(URL, "input"), ("/v1/attention", "image")])
async def test_who_joins_has_a_deadline_of_their_own(
    serve: Serve, encoder: FakeEncoder, path: str, field: str
) -> None:
    asked = {field: data_uri(png(1))}
    async with serve(deadline_seconds=3.0, raise_errors=False) as client:
        with encoder.busy() as model:
            first = asyncio.ensure_future(client.post(path, json=asked))
            await asyncio.to_thread(model.wait_until_reached)
            await asyncio.sleep(1.5)
            second, third = (asyncio.ensure_future(client.post(path, json=asked)) for _ in range(2))
            await until_joined(client, 2)
            error_of(await first, 503, "deadline_exceeded")
            model.open()  # it is still computed, for the others
            assert (await second).status_code == (await third).status_code == 200
    assert [number for _, number in encoder.calls] == [1]


async def test_a_picture_is_expected_while_it_is_decoded_and_no_longer(
    serve: Serve, encoder: FakeEncoder
) -> None:
    async with serve(decode_threads=1, max_decode_queue=1, max_request_images=1) as client:
        batcher = vision_of(client).batcher
        with encoder.slow_decoding() as gate:
            first = asyncio.create_task(client.post(URL, json=body(1)))
            await asyncio.to_thread(gate.wait_until_reached)
            assert batcher._expected == 1
            error_of(await client.post(URL, json=body(2)), 429, "queue_full")
            assert batcher._expected == 1
            gate.open()
            json_of(await first)
        assert batcher._expected == 0
        await leave_while_decoding(client, encoder, seed=3)
        while vision_of(client)._pool.pictures:  # it is decoded to the end
            await asyncio.sleep(0.001)
        damaged = {"input": "data:image/png;base64,AAAA"}
        error_of(await client.post(URL, json=damaged), 415, "unsupported_image")
        assert batcher._expected == 0
