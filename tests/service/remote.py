"""Servers on loopback addresses that answer as a test says, and resolvers that do."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Behaviour = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request that came, and the way back.

    Attributes:
        head: its first line and headers.
        sent: bytes that were written.
    """

    def __init__(self, head: str, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.sent = 0
        self._writer = writer

    @property
    def path(self) -> str:
        return self.head.split(" ", 2)[1]

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.strip().splitlines()[1:]
        return {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}

    async def send(self, content: bytes) -> None:
        self._writer.write(content)
        await self._writer.drain()
        self.sent += len(content)

    async def answer(
        self, body: bytes = b"", *headers: str, status: str = "200 OK", length: int | None = None
    ) -> None:
        told = len(body) if length is None else length
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {told}", *headers]
        await self.send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    async def redirect(self, location: str, status: str = "302 Found") -> None:
        await self.answer(b"moved", f"Location: {location}", status=status)

    def reset(self) -> None:
        self._writer.transport.abort()


class Remote:
    """A server that is up.

    Attributes:
        connections: how many were made.
        exchanges: the requests, in their order.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self.connections = 0
        self.exchanges: list[Exchange] = []
        self.port = 0

    def url(self, path: str = "/picture", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                self.exchanges.append(Exchange(head.decode("latin-1"), writer))
                await self._behaviour(self.exchanges[-1])
        finally:
            writer.close()


@asynccontextmanager
async def remote(
    behaviour: Behaviour,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Remote]:
    """A server, on a port of its own unless one is given, until the block ends."""
    up = Remote(behaviour)
    server = await asyncio.start_server(up.serve, host, port, ssl=tls)
    up.port = server.sockets[0].getsockname()[1]
    try:
        yield up
    finally:
        server.close()


def sends(body: bytes, *headers: str, status: str = "200 OK") -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.answer(body, *headers, status=status)

    return behave


async def unexpected(exchange: Exchange) -> None:
    """For servers that nobody may reach: a test looks at their count of connections."""
    await exchange.answer(b"the secret of a server within")


class Names:
    """A resolver whose answer may differ each time; the last one stays.

    Attributes:
        asked: the names that were looked up, in their order.
    """

    def __init__(self, *answers: list[str] | OSError) -> None:
        self._answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer
