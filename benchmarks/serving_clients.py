"""Closed-loop clients for `serving.py`, as light as they can be: raw sockets in one event loop."""

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

_BOUNDARY = b"----benchmark"


@dataclass(frozen=True)
class Target:
    """Where pictures go: a multipart form with one file, as a browser or curl sends it."""

    port: int
    path: str = "/v1/embeddings"
    field: str = "image"

    def request(self, content: bytes) -> bytes:
        part = (
            f'Content-Disposition: form-data; name="{self.field}"; filename="a"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        body = b"--%s\r\n%s%s\r\n--%s--\r\n" % (_BOUNDARY, part, content, _BOUNDARY)
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Content-Type: multipart/form-data; boundary={_BOUNDARY.decode()}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True)
class Load:
    """What clients saw.

    Attributes:
        seconds_each: of each request that was answered, in the order of the answers.
        per_s: answers a second, while all clients were at it.
    """

    seconds_each: list[float]
    per_s: float


def drive(
    target: Target, pictures: Iterator[bytes], *, clients: int, seconds: float = math.inf
) -> Load:
    """`clients` that each ask again as soon as they are answered.

    Until the pictures end, or for about `seconds`.

    Raises:
        RuntimeError: an answer that is not 200.
    """
    return asyncio.run(_drive(target, pictures, clients, seconds))


async def _drive(target: Target, pictures: Iterator[bytes], clients: int, seconds: float) -> Load:
    seconds_each: list[float] = []
    start = last = time.perf_counter()

    async def client() -> None:
        nonlocal last
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        try:
            while time.perf_counter() < start + seconds and (content := next(pictures, None)):
                seconds_each.append(await _exchange(reader, writer, target.request(content)))
                last = time.perf_counter()
        finally:
            writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    # To the last answer: the requests under way at the end are counted, and so is their time.
    return Load(seconds_each, len(seconds_each) / (last - start))


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> float:
    before = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    body = await reader.readexactly(length)
    took = time.perf_counter() - before
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"{head.decode()}{body[:500].decode(errors='replace')}")
    return took
