"""What tests of the fetcher share."""

import ssl
from typing import Any

import pytest

from service.addresses import parse_allowances
from service.errors import ImageError
from service.fetching import Fetcher
from tests.service.remote import Remote

LIMIT = 100_000
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and takes no time to make


def make(*allowed: Remote | str, **options: Any) -> Fetcher:
    """A fetcher that may reach some servers on 127.0.0.1, or the networks given as text."""
    allow = ",".join(one if isinstance(one, str) else f"127.0.0.1:{one.port}" for one in allowed)
    given = {"max_bytes": LIMIT, "timeout_s": 20.0, "max_fetches": 4, "tls": TLS, **options}
    return Fetcher(allow=parse_allowances(allow), **given)


async def get(fetcher: Fetcher, url: str) -> bytes:
    async with fetcher.fetched(url, param="input[1]") as content:
        return content


async def refused(fetcher: Fetcher, url: str, code: str, status: int = 400) -> str:
    """The message of a fetch that must fail so."""
    with pytest.raises(ImageError) as caught:
        await get(fetcher, url)
    error = caught.value
    assert (error.code, error.status, error.param) == (code, status, "input[1]"), error.message
    assert error.message.startswith("input[1] ")
    return error.message
