"""Where the fetcher goes, and where not: names, addresses, ports, redirects."""

import asyncio
import socket
from collections.abc import Sequence

import pytest

from tests.service.fetches import get, make, refused
from tests.service.pictures import png
from tests.service.remote import Exchange, Names, remote, sends, unexpected

pytestmark = pytest.mark.anyio
PICTURE = png(1)


async def test_a_picture_comes_as_it_is_and_little_is_told_of_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with remote(unexpected) as proxy, remote(sends(PICTURE)) as server:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url())
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert await get(make(server), server.url("/a%20b?c=d#e")) == PICTURE
        (exchange,) = server.exchanges
        assert exchange.head.startswith("GET /a%20b?c=d HTTP/1.1\r\n")
        assert exchange.headers == {
            "host": f"127.0.0.1:{server.port}",
            "accept": "image/*",
            "accept-encoding": "identity",
            "user-agent": "dinoscope",
        }
        assert proxy.connections == 0


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1/", "url_not_allowed"),
        ("https://127.0.0.1/", "url_not_allowed"),
        ("http://localhost/", "url_not_allowed"),
        ("http://127.1/", "url_not_allowed"),
        ("http://0x7f.1/", "url_not_allowed"),
        ("http://0177.0.0.1/", "invalid_url"),
        ("http://2130706433/", "url_not_allowed"),
        ("http://0/", "url_not_allowed"),
        ("http://0.0.0.0/", "url_not_allowed"),
        ("http://[::1]/", "url_not_allowed"),
        ("http://[::]/", "url_not_allowed"),
        ("http://[::ffff:127.0.0.1]/", "url_not_allowed"),
        ("http://[::ffff:7f00:1]/", "url_not_allowed"),
        ("http://[64:ff9b::7f00:1]/", "url_not_allowed"),
        ("http://[2002:7f00:1::]/", "url_not_allowed"),
        ("http://[fe80::1]/", "url_not_allowed"),
        ("http://169.254.169.254/latest/meta-data/", "url_not_allowed"),
        ("http://10.0.0.1/", "url_not_allowed"),
        ("http://100.64.0.1/", "url_not_allowed"),
        ("http://224.0.0.1/", "url_not_allowed"),
        ("http://255.255.255.255/", "url_not_allowed"),
        ("http://8.8.8.8:22/", "url_not_allowed"),
        ("http://8.8.8.8:0/", "url_not_allowed"),
        ("http://8.8.8.8:70000/", "url_not_allowed"),
        ("http://me:secret@8.8.8.8/", "invalid_url"),
        ("http://8.8.8.8@127.0.0.1/", "invalid_url"),
        ("http://127.0.0.1\\@8.8.8.8/", "invalid_url"),
        ("http://8.8.8.8/a b", "invalid_url"),
        ("http://8.8.8.8/\r\nX-Header: 1", "invalid_url"),
        ("http://8.8.8.8/\x00", "invalid_url"),
        ("http://8.8.8.8\u2028/", "invalid_url"),
        ("http:///picture", "invalid_url"),
        ("http://", "invalid_url"),
        ("http://.example/", "invalid_url"),
        ("http://a..example/", "invalid_url"),
        ("http://exa%6dple/", "invalid_url"),
        ("http://127.0.0.1%00.example/", "invalid_url"),
        ("http://[fe80::1%25lo]/", "invalid_url"),
        ("http://[127.0.0.1]/", "invalid_url"),
        ("http://[::1/", "invalid_url"),
        ("http://\uff11\uff12\uff17.0.0.1/", "invalid_url"),
        ("http://" + "a" * 64 + ".example/", "invalid_url"),
        ("http://" + "a." * 127 + "example/", "invalid_url"),
        ("http://8.8.8.8/" + "a" * 9000, "invalid_url"),
        ("http://8.8.8.8:http/", "invalid_url"),
        ("ftp://8.8.8.8/", "invalid_url"),
        ("file:///etc/passwd", "invalid_url"),
    ],
)
async def test_urls_that_are_refused_unseen(url: str, code: str) -> None:
    message = await refused(make(), url, code)
    assert "secret" not in message


async def test_the_port_is_named_and_no_name_is_looked_up_for_a_wrong_one() -> None:
    names = Names(["8.8.8.8"])
    message = await refused(make(resolve=names), "http://a.example:8080/", "url_not_allowed")
    assert "8080" in message
    assert "80 and 443" in message
    assert names.asked == []
    # An allowance for one network at a port is none for that port elsewhere.
    fetcher = make("10.0.0.0/8:8080", resolve=names)
    assert "8080" in await refused(fetcher, "http://a.example:8080/", "url_not_allowed")


async def test_a_name_is_looked_up_once_and_the_connection_goes_where_it_led() -> None:
    async with remote(sends(PICTURE)) as server:
        names = Names(["127.0.0.1"], ["10.0.0.1"])
        url = server.url(host="pictures.example")
        assert await get(make(server, resolve=names), url) == PICTURE
        assert names.asked == ["pictures.example"]
        assert server.exchanges[0].headers["host"] == f"pictures.example:{server.port}"


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
async def test_an_ipv6_literal() -> None:
    async with remote(sends(PICTURE), host="::1") as server:
        url = server.url(host="[::1]")
        assert await get(make(f"[::1]:{server.port}"), url) == PICTURE
        assert server.exchanges[0].headers["host"] == f"[::1]:{server.port}"
        await refused(make(server), url, "url_not_allowed")


async def test_rebinding() -> None:
    """The name leads to an address that is allowed when it is checked, and within ever after."""
    async with remote(unexpected) as within:
        names = Names(["127.0.0.2"], ["127.0.0.1"])
        allowed = make(f"127.0.0.2:{within.port}", resolve=names)
        await refused(allowed, within.url(host="evil.example"), "url_unreachable")
        assert (within.connections, names.asked) == (0, ["evil.example"])

        async def redirect(exchange: Exchange) -> None:
            await exchange.redirect("/again")

        names = Names(["127.0.0.2"], ["127.0.0.1"])
        allowed = make(f"127.0.0.2:{within.port}", resolve=names)
        async with remote(redirect, host="127.0.0.2", port=within.port) as first:
            await refused(allowed, within.url(host="evil.example"), "url_not_allowed")
        assert (first.connections, within.connections) == (1, 0)
        assert names.asked == ["evil.example"] * 2


@pytest.mark.parametrize(
    "addresses", [["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "::1"]]
)
async def test_one_bad_address_among_good_ones(addresses: list[str]) -> None:
    async with remote(unexpected) as within:
        fetcher = make(f"127.0.0.2:{within.port}", resolve=Names(addresses))
        await refused(fetcher, within.url(host="two.example"), "url_not_allowed")
        assert within.connections == 0


async def test_the_next_address_where_one_takes_no_connection() -> None:
    async with remote(sends(PICTURE)) as server:
        names = Names(["127.0.0.2", "127.0.0.2", "127.0.0.1"])
        fetcher = make("127.0.0.0/8:" + str(server.port), resolve=names)
        assert await get(fetcher, server.url(host="two.example")) == PICTURE


@pytest.mark.parametrize(
    "names",
    [Names(socket.gaierror(socket.EAI_NONAME, "unknown")), Names([])],
    ids=["fails", "is empty"],
)
async def test_a_look_up_that_fails(names: Names) -> None:
    await refused(make(resolve=names), "http://none.example/", "url_unreachable")


async def test_a_look_up_that_does_not_end() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(3600)
        raise AssertionError

    fetcher = make(resolve=never, timeout_s=0.2)
    assert "0.2 s" in await refused(fetcher, "http://slow.example/", "url_timeout")


@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
async def test_redirects_are_followed(status: str) -> None:
    async def behave(exchange: Exchange) -> None:
        if exchange.path == "/old/a?b=c":
            await exchange.redirect("../new#part", status)
        else:
            await exchange.answer(PICTURE)

    async with remote(behave) as server:
        assert await get(make(server), server.url("/old/a?b=c")) == PICTURE
        assert [exchange.path for exchange in server.exchanges] == ["/old/a?b=c", "/new"]


@pytest.mark.parametrize(
    ("location", "code"),
    [
        ("http://127.0.0.1:{within}/secret-name", "url_not_allowed"),
        ("//localhost:{within}/secret-name", "url_not_allowed"),
        ("http://[::1]/secret-name", "url_not_allowed"),
        ("http://169.254.169.254/secret-name", "url_not_allowed"),
        ("http://2130706433/secret-name", "url_not_allowed"),
        ("https://10.0.0.1/secret-name", "url_not_allowed"),
        ("http://secret-name:x@8.8.8.8/", "invalid_url"),
        ("file:///secret-name", "invalid_url"),
        ("gopher://127.0.0.1:{within}/secret-name", "invalid_url"),
        ("data:image/png;base64,secret-name", "invalid_url"),
        ("http://[secret-name/", "invalid_url"),
        ("http://\xff\xfe\x00secret-name/", "url_bad_answer"),
        ("", "url_bad_answer"),
    ],
)
async def test_redirects_are_checked_as_urls_are(location: str, code: str) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.redirect(location.format(within=within.port))

    async with remote(unexpected) as within, remote(behave) as server:
        message = await refused(make(server), server.url(), code)
        assert "secret-name" not in message
        assert (server.connections, within.connections) == (1, 0)


async def test_a_redirect_without_a_location() -> None:
    async with remote(sends(b"", status="302 Found")) as server:
        await refused(make(server), server.url(), "url_bad_answer")


async def test_redirects_end() -> None:
    async def behave(exchange: Exchange) -> None:
        steps = int(exchange.path[1:])
        await (exchange.redirect(f"/{steps - 1}") if steps else exchange.answer(PICTURE))

    async with remote(behave) as server:
        assert await get(make(server), server.url("/3")) == PICTURE
        assert "3 times" in await refused(make(server), server.url("/4"), "url_bad_answer")
        assert len(server.exchanges) == 4 + 4


async def test_a_redirects_body_is_not_waited_for() -> None:
    async def behave(exchange: Exchange) -> None:
        if exchange.path == "/new":
            await exchange.answer(PICTURE)
        else:
            await exchange.answer(b"", "Location: /new", status="302 Found", length=10**12)
            await asyncio.sleep(3600)

    async with remote(behave) as server:
        assert await get(make(server), server.url("/old")) == PICTURE
