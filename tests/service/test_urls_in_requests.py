"""URLs where a request's JSON has pictures."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import data_uri, png
from tests.service.remote import Exchange, Remote, remote, unexpected

pytestmark = pytest.mark.anyio
PAGE = b"<html>secret-content</html>"


async def behave(exchange: Exchange) -> None:
    """`/5` is picture 5."""
    if exchange.path == "/page":
        await exchange.answer(PAGE, "Content-Type: image/png")
    elif exchange.path == "/gone":
        await exchange.answer(b"secret-content", status="410 secret-reason")
    elif exchange.path == "/empty":
        await exchange.answer(b"")
    else:
        await exchange.answer(png(int(exchange.path[1:])))


@pytest.fixture
async def server() -> AsyncIterator[Remote]:
    async with remote(behave) as up:
        yield up


@pytest.fixture
async def client(serve: Serve, server: Remote) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(fetch_urls=True, fetch_allow=f"127.0.0.1:{server.port}") as opened:
        yield opened


def bodies(picture: str) -> dict[str, dict[str, Any]]:
    """Every request with a picture in JSON; a list's stands second."""
    other = data_uri(png(99))
    collection = "/v1/collections/default"
    return {
        "/v1/embeddings": {"input": [other, picture]},
        "/v1/attention": {"image": picture},
        f"{collection}/search": {"image": picture},
        f"{collection}/classify": {"image": picture, "label": "name"},
        f"{collection}/copies": {"image": picture},
        f"{collection}/images": {"images": [{"image": picture, "metadata": {"name": "x"}}]},
    }


def place(path: str) -> str:
    return {"/v1/embeddings": "input[1]", "/v1/collections/default/images": "images[0]"}.get(
        path, "image"
    )


async def test_a_url_is_as_good_as_its_picture(client: httpx.AsyncClient, server: Remote) -> None:
    for path, body in bodies(server.url("/1")).items():
        by_url = await client.post(path, json=body)
        assert by_url.status_code == 200, by_url.text
        by_value = await client.post(path, json=bodies(data_uri(png(1)))[path])
        if path.endswith("/images"):
            (stored,), (again,) = by_url.json()["images"], by_value.json()["images"]
            assert (stored["outcome"], again["outcome"]) == ("created", "unchanged")
            assert stored["id"] == again["id"]
        else:
            assert by_url.content == by_value.content
    assert len(server.exchanges) == len(bodies(""))


async def test_fetching_is_off_unless_it_is_switched_on(serve: Serve, server: Remote) -> None:
    async with serve(fetch_allow=f"127.0.0.1:{server.port}") as client:
        for path, body in bodies(server.url("/1").replace("http", "HTTP")).items():
            error = error_of(await client.post(path, json=body), 400, "url_fetching_off")
            assert error["param"] == place(path)
            assert "DINOSCOPE_FETCH_URLS=true" in error["message"]
    assert server.connections == 0


@pytest.mark.parametrize(
    ("path_there", "status", "code"),
    [
        ("/page", 415, "unsupported_image"),
        ("/gone", 400, "url_bad_answer"),
        ("/empty", 400, "invalid_image"),
        ("", 400, "url_not_allowed"),
    ],
)
async def test_what_fails_names_its_place_and_tells_nothing_of_the_answer(
    client: httpx.AsyncClient,
    server: Remote,
    encoder: FakeEncoder,
    path_there: str,
    status: int,
    code: str,
) -> None:
    async with remote(unexpected) as within:
        url = server.url(path_there) if path_there else within.url()
        for path, body in bodies(url).items():
            response = await client.post(path, json=body)
            error = error_of(response, status, code)
            assert error["param"] == place(path)
            assert error["message"].startswith(place(path))
            assert "secret" not in response.text
        assert within.connections == 0
    assert encoder.calls == []


async def test_one_bad_url_of_an_upload_fails_alone(
    client: httpx.AsyncClient, server: Remote
) -> None:
    urls = [server.url("/1"), server.url("/gone"), "http://10.0.0.1/", server.url("/2")]
    body = {"images": [{"image": url, "id": str(i)} for i, url in enumerate(urls)]}
    answer = json_of(await client.post("/v1/collections/default/images", json=body))["images"]
    assert [one["outcome"] for one in answer] == ["created", "failed", "failed", "created"]
    assert [one["error"]["code"] for one in answer[1:3]] == ["url_bad_answer", "url_not_allowed"]
    assert answer[1]["error"]["param"] == "images[1]"


async def test_the_limit_on_pictures_holds_for_fetched_ones(serve: Serve, server: Remote) -> None:
    small = {"max_image_bytes": 50, "fetch_urls": True}
    async with serve(**small, fetch_allow=f"127.0.0.1:{server.port}") as client:
        response = await client.post("/v1/embeddings", json={"input": server.url("/1")})
        error = error_of(response, 413, "image_too_large")
        assert "50 bytes" in error["message"]


async def test_a_full_house_says_when_to_come_again(serve: Serve) -> None:
    async def hold(exchange: Exchange) -> None:
        await exchange.answer(b"", length=100)
        await release.wait()

    release = asyncio.Event()
    async with remote(hold) as slow:
        limits = {"max_fetches": 1, "fetch_timeout_s": 0.5, "fetch_urls": True}
        async with serve(**limits, fetch_allow=f"127.0.0.1:{slow.port}") as client:
            inputs = [slow.url()] * 4
            responses = await asyncio.gather(
                *(client.post("/v1/embeddings", json={"input": one}) for one in inputs)
            )
        release.set()
    codes = {r.json()["error"]["code"]: r for r in responses}
    assert set(codes) == {"url_timeout", "too_many_fetches"}
    assert codes["too_many_fetches"].status_code == 429
    assert codes["too_many_fetches"].headers["Retry-After"] == "1"
