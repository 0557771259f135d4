"""Many requests at once, over HTTP."""

import asyncio

import httpx
import pytest

from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import PATIENCE_S, FakeEncoder
from tests.service.pictures import data_uri, png

pytestmark = pytest.mark.anyio
URL = "/v1/embeddings"


def body(*seeds: int) -> dict[str, list[str]]:
    return {"input": [data_uri(png(seed)) for seed in seeds]}


async def test_429_when_the_queue_is_full(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(max_queue=4, max_request_images=2) as client:
        with encoder.busy() as model:
            first = asyncio.ensure_future(client.post(URL, json=body(1)))
            await asyncio.to_thread(model.wait_until_reached)
            pair = [
                asyncio.ensure_future(client.post(URL, json=body(2 * i, 2 * i + 1)))
                for i in range(1, 4)
            ]
            done, waiting = await asyncio.wait(
                pair, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S
            )
            refused = done.pop().result()
            assert not done  # the other two have a place
            error = error_of(refused, 429, "queue_full")
            assert error["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
            model.open()
            for task in (first, *waiting):
                json_of(await task)
        json_of(await client.post(URL, json=body(2, 3)))


async def test_429_beyond_the_most_requests(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(max_requests=1) as client:
        with encoder.busy() as model:
            first = asyncio.ensure_future(client.post(URL, json=body(1)))
            await asyncio.to_thread(model.wait_until_reached)
            refused = await client.post(URL, json=body(2))
            assert "under way" in error_of(refused, 429, "too_many_requests")["message"]
            assert refused.headers["retry-after"] == "1"
            json_of(await client.get("/readyz"))  # carries no picture
            model.open()
            json_of(await first)
        json_of(await client.post(URL, json=body(2)))


async def test_429_where_the_deadline_would_be_missed(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(deadline_seconds=3.0) as client:
        encoder.pause_s = 0.3
        for seed in range(5):  # the mean between answers comes to some .1 s
            json_of(await client.post(URL, json=body(seed)))
        encoder.pause_s = 0.0
        with encoder.slow_decoding() as decoding:
            waiting = [asyncio.ensure_future(client.post(URL, json=body(9)))]
            await asyncio.to_thread(decoding.wait_until_reached)
            while not any(one.done() for one in waiting):
                waiting.append(asyncio.ensure_future(client.post(URL, json=body(9))))
                await asyncio.sleep(0.02)
            decoding.open()
            answers = await asyncio.gather(*waiting)
        refused = [one for one in answers if one.status_code != 200]
        assert 1 < len(answers) - len(refused) < 64
        codes = {error_of(one, 429)["code"] for one in refused}
        assert "too_many_requests" in codes  # behind it the batcher may refuse some as well
        assert codes <= {"too_many_requests", "queue_too_long"}


async def test_a_full_queue_stores_nothing_of_an_upload(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(max_queue=4, max_request_images=2) as client:
        with encoder.busy() as model:
            first = asyncio.ensure_future(client.post(URL, json=body(1)))
            await asyncio.to_thread(model.wait_until_reached)
            second = asyncio.ensure_future(client.post(URL, json=body(2)))
            await _until_waiting(client, 1)
            files = [("image", ("a.png", png(seed))) for seed in (3, 4)]
            response = await client.post("/v1/collections/default/images", files=files)
            error_of(response, 429, "queue_full")
            model.open()
            for task in (first, second):
                json_of(await task)
        assert json_of(await client.get("/v1/collections/default"))["count"] == 0


async def test_requests_that_come_together_share_a_call(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(cache_bytes=0) as client:
        with encoder.busy() as model:
            first = asyncio.ensure_future(client.post(URL, json=body(0)))
            await asyncio.to_thread(model.wait_until_reached)
            rest = [
                asyncio.ensure_future(client.post(URL, json=body(seed))) for seed in range(1, 6)
            ]
            attention = asyncio.ensure_future(
                client.post("/v1/attention", files={"image": ("a.png", png(1))})
            )
            await _until_waiting(client, 6)
            model.open()
            answers = [json_of(response) for response in await asyncio.gather(first, *rest)]
            assert (await attention).status_code == 200
        calls = sorted((str(task), count) for task, count in encoder.calls[1:])
        assert calls == [("attention", 1), ("cls", 5)]
        for seed, answer in enumerate(answers):
            alone = json_of(await client.post(URL, json=body(seed)))
            assert answer["data"] == alone["data"]


async def test_a_slow_picture_or_model_blocks_nobody_else(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    for seed, held in enumerate((encoder.slow_decoding, encoder.busy)):
        with held() as gate:
            slow = asyncio.ensure_future(client.post(URL, json=body(seed)))
            await asyncio.to_thread(gate.wait_until_reached)
            for path in ("/healthz", "/readyz", "/v1/collections", "/v1/models"):
                json_of(await client.get(path))
            assert not slow.done()
            gate.open()
            json_of(await slow)


async def test_uploads_at_once_keep_their_pictures_apart(client: httpx.AsyncClient) -> None:
    async def upload(seed: int) -> None:
        files = [("image", ("a.png", png(seed * 10 + i))) for i in range(3)]
        data = {"id": [f"{seed}-{i}" for i in range(3)]}
        json_of(await client.post("/v1/collections/default/images", files=files, data=data))

    await asyncio.gather(*(upload(seed) for seed in range(6)))
    assert json_of(await client.get("/v1/collections/default"))["count"] == 18
    for seed, i in ((0, 0), (3, 1), (5, 2)):
        response = await client.post(
            "/v1/collections/default/search",
            files={"image": ("a.png", png(seed * 10 + i))},
            params={"k": 1},
        )
        (match,) = json_of(response)["matches"]
        assert match["id"] == f"{seed}-{i}"
        assert match["score"] == pytest.approx(1.0, abs=1e-5)


async def _until_waiting(client: httpx.AsyncClient, count: int) -> None:
    services = client._transport.app.state.lifecycle.services
    async with asyncio.timeout(PATIENCE_S):
        while services.models.loaded[0].batcher.waiting < count:
            await asyncio.sleep(0.001)
