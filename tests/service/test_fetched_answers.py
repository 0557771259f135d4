"""The fetcher against servers of the test's own that answer as badly as they can."""

import asyncio
import gzip
import time
from itertools import count

import pytest

from service.errors import ImageError
from tests.service.fetches import LIMIT, get, make, refused
from tests.service.pictures import png
from tests.service.remote import Behaviour, Exchange, remote, sends

pytestmark = pytest.mark.anyio
PICTURE = png(1)


async def endless(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await exchange.send(bytes(2**16))


async def endless_chunks(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await exchange.send(b"10000\r\n" + bytes(2**16) + b"\r\n")


async def lying_length(exchange: Exchange) -> None:
    """Two lengths, the small one first."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
    await exchange.send(head)
    while True:
        await exchange.send(b"10000\r\n" + bytes(2**16) + b"\r\n")


@pytest.mark.parametrize("behave", [endless, endless_chunks, lying_length])
async def test_endless_bodies(behave: Behaviour) -> None:
    async with remote(behave) as server:
        message = await refused(make(server), server.url(), "image_too_large", 413)
        assert str(LIMIT) in message
        # What the kernel's buffers take beyond the limit is no more than some megabytes.
        assert server.exchanges[0].sent < 32 * 2**20


async def test_the_limit_is_inclusive() -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.answer(bytes(int(exchange.path[1:])))

    async with remote(behave) as server:
        assert len(await get(make(server), server.url(f"/{LIMIT}"))) == LIMIT
        await refused(make(server), server.url(f"/{LIMIT + 1}"), "image_too_large", 413)


async def test_a_told_length_that_is_too_large_is_enough() -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.answer(b"", length=LIMIT + 1)
        await asyncio.sleep(3600)

    async with remote(behave) as server:
        await refused(make(server), server.url(), "image_too_large", 413)


async def drip(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n")
    while True:
        await exchange.send(b"x")
        await asyncio.sleep(0.01)


async def dripping_headers(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await exchange.send(b"X: y\r\n")
        await asyncio.sleep(0.01)


async def dripping_continues(exchange: Exchange) -> None:
    while True:
        await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await asyncio.sleep(0.01)


async def silent(exchange: Exchange) -> None:
    await asyncio.sleep(3600)


async def slow_redirects(exchange: Exchange) -> None:
    """Each within the time, all of them not."""
    await asyncio.sleep(0.3)
    await exchange.redirect("/again")


@pytest.mark.parametrize(
    "behave", [drip, dripping_headers, dripping_continues, silent, slow_redirects]
)
async def test_one_deadline_for_the_whole(behave: Behaviour) -> None:
    async with remote(behave) as server:
        start = time.monotonic()
        message = await refused(make(server, timeout_s=0.5), server.url(), "url_timeout")
        assert "0.5 s" in message
        assert 0.4 < time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "url_bad_answer"),
        (b"\x89PNG secret-name\r\n\r\n", "url_bad_answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nsecret", "url_bad_answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nsecret", "url_bad_answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc", "url_bad_answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nsecret", "url_bad_answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 500_000, "url_bad_answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: secret\r\n" * 50_000, "url_bad_answer"),
        (b"HTTP/1.1 204 secret\r\n\r\n", "url_bad_answer"),
        (b"HTTP/1.1 206 x\r\nContent-Length: 6\r\n\r\nsecret", "url_bad_answer"),
        (b"HTTP/1.1 404 secret\r\nContent-Length: 6\r\n\r\nsecret", "url_bad_answer"),
        (b"HTTP/1.1 500 x\r\nX: secret\r\nContent-Length: 6\r\n\r\nsecret", "url_bad_answer"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: secret\r\n\r\n", "url_bad_answer"),
    ],
    ids=count(),
)
async def test_answers_that_are_none(raw: bytes, code: str) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.send(raw)

    async with remote(behave) as server:
        message = await refused(make(server), server.url(), code)
        assert "secret" not in message
        if b" 404 " in raw:
            assert "status 404" in message


async def test_a_length_shorter_than_the_body_cuts_it() -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.answer(PICTURE, length=20)

    async with remote(behave) as server:
        assert await get(make(server), server.url()) == PICTURE[:20]


async def test_a_connection_that_is_reset_or_refused() -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        exchange.reset()

    async with remote(behave) as server:
        with pytest.raises(ImageError) as caught:
            await get(make(server), server.url())
        assert caught.value.code in ("url_unreachable", "url_bad_answer")
    await refused(make(server), server.url(), "url_unreachable")  # nobody listens any more


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"])
async def test_compressed_answers_are_not_unpacked(encoding: str) -> None:
    bomb = gzip.compress(bytes(20_000_000))  # 20 MB in 20 kB
    assert len(bomb) < LIMIT
    async with remote(sends(bomb, f"Content-Encoding: {encoding}")) as server:
        await refused(make(server), server.url(), "url_bad_answer")


async def test_what_hides_that_it_is_compressed_stays_as_it_is() -> None:
    bomb = gzip.compress(bytes(1_000_000))
    async with remote(sends(bomb, "Content-Encoding: identity")) as server:
        assert await get(make(server), server.url()) == bomb


async def test_at_most_so_many_at_once_until_they_are_decoded() -> None:
    async with remote(sends(PICTURE)) as server:
        fetcher = make(server, max_fetches=2, timeout_s=0.5)
        async with fetcher.fetched(server.url(), param="a"):
            async with fetcher.fetched(server.url(), param="b"):
                message = await refused(fetcher, server.url(), "too_many_fetches", 429)
                assert "2 are being fetched" in message
            assert await get(fetcher, server.url()) == PICTURE
        assert server.connections == 3


async def test_failures_and_cancelled_fetches_give_their_place_back() -> None:
    async with remote(silent) as slow, remote(sends(PICTURE)) as server:
        fetcher = make(slow, server, max_fetches=1)
        await refused(fetcher, "http://10.0.0.1/", "url_not_allowed")
        task = asyncio.create_task(get(fetcher, slow.url()))
        while not slow.exchanges:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await get(fetcher, server.url()) == PICTURE
