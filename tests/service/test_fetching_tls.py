"""Fetching over TLS: the address is pinned, the certificate is the host name's."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from service.addresses import parse_allowances
from service.errors import ImageError
from service.fetching import Fetcher
from tests.service.pictures import png
from tests.service.remote import Exchange, Names, remote, sends, unexpected

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on the path"),
]
NAME = "pictures.example"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of `NAME`, signed by itself: the file, and its key's."""
    folder = tmp_path_factory.mktemp("tls")
    files = (folder / "certificate.pem", folder / "key.pem")
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    name = ["-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    made = subprocess.run(
        ["openssl", "req", *kind, *name, "-out", str(files[0]), "-keyout", str(files[1])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return files


@pytest.fixture
def trusting(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


@pytest.fixture
def server_names() -> list[str | None]:
    return []


@pytest.fixture
def offered(certificate: tuple[Path, Path], server_names: list[str | None]) -> ssl.SSLContext:
    """The server's side; the names that clients ask for are gathered."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = lambda _, name, __: server_names.append(name)
    return context


def make(port: int, tls: ssl.SSLContext | None) -> Fetcher:
    return Fetcher(
        max_bytes=100_000,
        timeout_s=20.0,
        max_fetches=2,
        allow=parse_allowances(f"127.0.0.1:{port}"),
        resolve=Names(["127.0.0.1"]),
        tls=tls,
    )


async def code_of(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(ImageError) as caught:
        async with fetcher.fetched(url, param="image"):
            pass
    return caught.value.code


async def test_the_certificate_is_checked_against_the_name_not_the_address(
    trusting: ssl.SSLContext, offered: ssl.SSLContext, server_names: list[str | None]
) -> None:
    async with remote(sends(png(1)), tls=offered) as server:
        fetcher = make(server.port, trusting)
        async with fetcher.fetched(f"https://{NAME}:{server.port}/", param="image") as content:
            assert content == png(1)
        assert server_names == [NAME]
        assert server.exchanges[0].headers["host"] == f"{NAME}:{server.port}"


async def test_certificates_that_do_not_hold(
    trusting: ssl.SSLContext, offered: ssl.SSLContext
) -> None:
    async with remote(unexpected, tls=offered) as server:
        other, address = (f"https://{h}:{server.port}/" for h in ("other.example", "127.0.0.1"))
        for fetcher, url in (
            (make(server.port, trusting), other),
            (make(server.port, trusting), address),
            (make(server.port, None), f"https://{NAME}:{server.port}/"),  # no public authority's
        ):
            assert await code_of(fetcher, url) == "url_unreachable"
        assert server.exchanges == []


async def test_a_server_that_does_not_speak_tls(trusting: ssl.SSLContext) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await code_of(make(port, trusting), f"https://{NAME}:{port}/") == "url_unreachable"


async def test_no_redirect_leads_away_from_tls(
    trusting: ssl.SSLContext, offered: ssl.SSLContext
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.redirect(f"http://{NAME}:{server.port}/")

    async with remote(behave, tls=offered) as server:
        url = f"https://{NAME}:{server.port}/"
        assert await code_of(make(server.port, trusting), url) == "url_not_allowed"
        assert len(server.exchanges) == 1
