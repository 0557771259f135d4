"""Closed-loop clients for `serving.py`, as light as they can be: plain sockets in one thread.

They run on the service's own cores, so what they take is missing there: .10 ms for a request, where
asyncio's streams took .155.
"""

import math
import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

_BOUNDARY = b"----benchmark"
_TAIL = b"\r\n--%s--\r\n" % _BOUNDARY
_END_OF_HEAD = b"\r\n\r\n"
_CHUNK = 1 << 18
_PATIENCE_S = 300


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
        body = b"--%s\r\n%s%s%s" % (_BOUNDARY, part, content, _TAIL)
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
        RuntimeError: an answer that is not 200 or has no length, or none.
        OSError: a connection that the service broke off.
    """
    seconds_each: list[float] = []
    poll = select.epoll()
    open_ones: dict[int, _Client] = {}
    start = last = time.perf_counter()

    def ask(client: _Client) -> bool:
        """Whether there was something to ask for."""
        if time.perf_counter() >= start + seconds or (content := next(pictures, None)) is None:
            return False
        client.ask(target.request(content))
        return True

    def watch(client: _Client) -> None:
        poll.modify(client.number, select.EPOLLIN | (select.EPOLLOUT if client.unsent else 0))

    try:
        for _ in range(clients):
            client = _Client(socket.create_connection(("127.0.0.1", target.port)))
            open_ones[client.number] = client
            poll.register(client.number, select.EPOLLIN)
        waiting = 0
        for client in open_ones.values():
            if ask(client):
                waiting += 1
                watch(client)
            else:
                poll.unregister(client.number)
        while waiting:
            ready = poll.poll(_PATIENCE_S)
            if not ready:
                raise RuntimeError(f"no answer within {_PATIENCE_S} s")
            for number, events in ready:
                client = open_ones[number]
                if events & select.EPOLLOUT:
                    client.send()
                    if not client.unsent:
                        watch(client)
                if events & ~select.EPOLLOUT and client.is_answered():
                    last = time.perf_counter()
                    seconds_each.append(last - client.asked)
                    if not ask(client):
                        waiting -= 1
                        poll.unregister(number)
                    elif client.unsent:
                        watch(client)
    finally:
        for client in open_ones.values():
            client.close()
        poll.close()
    # To the last answer: the requests under way at the end are counted, and so is their time.
    return Load(seconds_each, len(seconds_each) / (last - start) if seconds_each else 0.0)


@dataclass
class _Client:
    """One connection, and the request that is under way on it."""

    connection: socket.socket
    asked: float = 0.0
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    _answer: bytes = b""
    _length: int = 0

    def __post_init__(self) -> None:
        self.connection.setblocking(False)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = self.connection.fileno()

    def ask(self, request: bytes) -> None:
        self.asked, self.unsent = time.perf_counter(), memoryview(request)
        self._answer, self._length = b"", 0
        self.send()

    def send(self) -> None:
        with suppress(BlockingIOError):
            self.unsent = self.unsent[self.connection.send(self.unsent) :]

    def is_answered(self) -> bool:
        """Takes what has come; whether that was the rest of the answer."""
        chunk = self.connection.recv(_CHUNK)
        if not chunk:
            raise RuntimeError("the service closed a connection without an answer")
        self._answer += chunk
        if not self._length:
            end = self._answer.find(_END_OF_HEAD)
            if end < 0:
                return False
            head = self._answer[:end].lower()
            size = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            if not size:
                raise RuntimeError(f"an answer without a length: {self._answer[:end]!r}")
            self._length = end + len(_END_OF_HEAD) + int(size)
        if len(self._answer) < self._length:
            return False
        if not self._answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(self._answer[:1000].decode(errors="replace"))
        return True

    def close(self) -> None:
        self.connection.close()
