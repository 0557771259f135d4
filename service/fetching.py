"""Pictures by URL, fetched so that nobody can reach through the service into its network.

A host name is looked up once and every address of it is checked; the connection then goes to one of
these addresses and asks no resolver again. So it is anew for each redirect. Nothing of a remote
answer but its status is ever told.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import httpcore
import httpx

from service.addresses import PORTS, Address, Allowance, may_connect, parse_address
from service.errors import ImageError

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_MOST_REDIRECTS = 3
_LONGEST_URL = 8192  # characters; signed URLs of object stores have some thousands
_NAME = re.compile(r"(?=.{1,253}\.?$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_IPV6 = re.compile(r"[0-9a-f.]*:[0-9a-f:.]+", re.IGNORECASE)
_MOVED = frozenset({301, 302, 303, 307, 308})


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host name, as the system knows them.

    Raises:
        OSError: the name cannot be looked up.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Fetcher:
    """Fetches pictures from public addresses, and from those that are allowed beside them.

    Args:
        max_bytes: largest picture; bytes are counted as they come, whatever Content-Length says.
        timeout_s: for one whole fetch with its look-ups and redirects, and for the wait before it.
        max_fetches: pictures fetched at once; a place is held until the picture has been read.
        allow: networks and ports that may be fetched from though they are not public.
        resolve: what looks up host names.
        tls: checks the certificates of https; default: against the public authorities.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout_s: float,
        max_fetches: int,
        allow: Sequence[Allowance] = (),
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._max_fetches = max_fetches
        self._allow = tuple(allow)
        self._resolve = resolve
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._places = asyncio.Semaphore(max_fetches)

    @asynccontextmanager
    async def fetched(self, url: str, *, param: str) -> AsyncIterator[bytes]:
        """`async with fetched(url) as content`: the undecoded picture.

        Args:
            param: where the URL stood in the request, for the message.

        Raises:
            ImageError: 400 a URL that is refused, or an answer that is no picture's; 413 too large;
                429 no place became free in time.
        """
        await self._take_place(param)
        try:
            yield await self._fetch(url, param)
        finally:
            self._places.release()

    async def _take_place(self, param: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._places.acquire()
        except TimeoutError as error:
            raise ImageError(
                f"{param} is a URL, and {self._max_fetches} are being fetched, which is the most; "
                "try again",
                code="too_many_fetches",
                param=param,
                status=429,
            ) from error

    async def _fetch(self, text: str, param: str) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(_parse(text))
        except _Failure as error:
            raise ImageError(
                f"{param} is a URL that cannot be fetched: {error}",
                code=error.code,
                param=param,
                status=error.status,
            ) from error
        except TimeoutError as error:
            raise ImageError(
                f"{param} is a URL that cannot be fetched: "
                f"the picture did not come within {self._timeout_s:g} s",
                code="url_timeout",
                param=param,
            ) from error

    async def _follow(self, url: httpx.URL) -> bytes:
        for _ in range(1 + _MOST_REDIRECTS):
            answer = await self._get(url)
            if isinstance(answer, bytes):
                return answer
            if (url.scheme, answer.scheme) == ("https", "http"):
                raise _Failure("it redirects from https to http", code="url_not_allowed")
            url = answer
        raise _Failure(f"it redirects more than {_MOST_REDIRECTS} times", code="url_bad_answer")

    async def _get(self, url: httpx.URL) -> bytes | httpx.URL:
        """The picture at a URL, or the URL that it redirects to."""
        port = _port(url)
        pinned = _Pinned(await self._look_up(_host(url), port), timeout_s=self._timeout_s)
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("Host", url.netloc),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "dinoscope"),
        ]
        connection = httpcore.AsyncHTTPConnection(
            httpcore.Origin(url.raw_scheme, url.raw_host, port),
            ssl_context=self._tls,
            network_backend=pinned,
        )
        target = httpcore.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=port, target=url.raw_path
        )
        try:
            async with connection, connection.stream("GET", target, headers=headers) as answer:
                if answer.status in _MOVED:
                    return _moved(url, answer)
                return await self._read(answer)
        except (httpcore.NetworkError, httpcore.TimeoutException, OSError) as error:
            raise _Failure(
                "no connection to its host, or it broke off", code="url_unreachable"
            ) from error
        except httpcore.ProtocolError as error:
            raise _Failure(
                "the answer is not HTTP, or was cut short", code="url_bad_answer"
            ) from error

    async def _look_up(self, host: str, port: int) -> list[Address]:
        """The addresses of a host, all of them checked."""
        wrong_port = _Failure(
            f"its port is {port}; allowed are {PORTS[0]} and {PORTS[1]}", code="url_not_allowed"
        )
        if port not in PORTS and not any(port in allowance.ports for allowance in self._allow):
            raise wrong_port
        try:
            addresses = [parse_address(host)]
        except ValueError:
            try:
                found = await self._resolve(host, port)
            except OSError as error:
                raise _Failure("its host cannot be looked up", code="url_unreachable") from error
            addresses = [parse_address(text) for text in dict.fromkeys(found)]
        if not all(may_connect(address, port, self._allow) for address in addresses):
            if port not in PORTS:
                raise wrong_port
            raise _Failure("it leads to an address that is not public", code="url_not_allowed")
        return addresses

    async def _read(self, answer: httpcore.Response) -> bytes:
        if answer.status != 200:
            raise _Failure(f"the answer has status {answer.status}", code="url_bad_answer")
        if _header(answer, b"content-encoding").lower() not in (b"", b"identity"):
            raise _Failure(
                "the answer is compressed, though it was asked for as it is", code="url_bad_answer"
            )
        length = _header(answer, b"content-length")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        content = bytearray()
        async for part in answer.aiter_stream():
            content += part
            if len(content) > self._max_bytes:
                raise self._too_large()
        return bytes(content)

    def _too_large(self) -> "_Failure":
        return _Failure(
            f"the picture is larger than {self._max_bytes} bytes",
            code="image_too_large",
            status=413,
        )


class _Failure(Exception):
    """Why a fetch came to nothing; holds nothing of the remote answer but its status."""

    def __init__(self, reason: str, *, code: str, status: int = 400) -> None:
        super().__init__(reason)
        self.code = code
        self.status = status


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to one of the given addresses, whatever the name of the host is."""

    def __init__(self, addresses: Sequence[Address], *, timeout_s: float) -> None:
        self._addresses = addresses
        # One address that does not answer leaves time for the others.
        self._each_s = timeout_s / (1 + len(addresses))
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address that takes one."""
        failure: Exception = httpcore.ConnectError("the host has no address")
        for address in self._addresses:
            try:
                return await self._network.connect_tcp(
                    str(address), port, self._each_s, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def _parse(text: str) -> httpx.URL:
    """A URL that may be looked at further: http(s), a plain host, and no credentials."""
    if len(text) > _LONGEST_URL:
        raise _Failure(f"it is longer than {_LONGEST_URL} characters", code="invalid_url")
    if "\\" in text or any(character.isspace() for character in text):
        raise _Failure("it holds a backslash or a space", code="invalid_url")
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise _Failure("it is not written as URLs are", code="invalid_url") from error
    if url.scheme not in ("http", "https"):
        raise _Failure("it is neither http nor https", code="invalid_url")
    if url.userinfo:
        raise _Failure("it holds a user name or a password", code="invalid_url")
    if not (_NAME.fullmatch(_host(url)) or _IPV6.fullmatch(_host(url))):
        raise _Failure("its host is neither a name nor an address", code="invalid_url")
    return url


def _moved(url: httpx.URL, answer: httpcore.Response) -> httpx.URL:
    location = _header(answer, b"location")
    if not location:
        raise _Failure("it redirects without saying where", code="url_bad_answer")
    try:
        return _parse(str(url.join(location.decode("latin-1"))))
    except httpx.InvalidURL as error:
        raise _Failure("it redirects to what is no URL", code="url_bad_answer") from error


def _host(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii")


def _port(url: httpx.URL) -> int:
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]


def _header(answer: httpcore.Response, name: bytes) -> bytes:
    return next((value for key, value in answer.headers if key.lower() == name), b"")
