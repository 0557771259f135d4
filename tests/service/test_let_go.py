"""What a request held is let go when it ends: cycles would keep its picture until the collector."""

import gc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from service.computing import Computation
from service.encoded import ReadPicture
from service.jobs import Job
from service.prepared import Prepared
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import png

pytestmark = pytest.mark.anyio
UPLOADS = "/v1/collections/default/images"
PICTURES = (Computation, Image.Image, Job, Prepared, ReadPicture)


@pytest.fixture
def saved() -> Iterator[list[Any]]:
    """What only the collector can free, once it has run."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def ask(client: httpx.AsyncClient, path: str, content: bytes) -> int:
    return (await client.post(path, files={"image": ("a.png", content)})).status_code


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/attention", UPLOADS])
@pytest.mark.parametrize("case", ["good", "bad", "failing", "uncached"])
async def test_no_picture_is_left_to_the_collector(
    serve: Serve, encoder: FakeEncoder, saved: list[Any], path: str, case: str
) -> None:
    cache_bytes = 0 if case == "uncached" else 2**20
    async with serve(raise_errors=False, cache_bytes=cache_bytes) as client:
        await ask(client, path, png(0))
        gc.collect()
        saved.clear()
        content, status = png(1), 200
        if case == "bad":
            content, status = png(1)[:60], 400
        if case == "failing":
            encoder.failure, status = RuntimeError("no"), 503
        for _ in range(3):
            assert await ask(client, path, content) == status
        gc.collect()
        left = [one for one in saved if isinstance(one, PICTURES)]
        assert left == [], case


@pytest.mark.parametrize(("path", "status"), [("/v1/embeddings", 400), (UPLOADS, 200)])
async def test_nor_of_several_of_which_one_is_bad(
    serve: Serve, saved: list[Any], path: str, status: int
) -> None:
    async with serve(raise_errors=False) as client:
        await ask(client, path, png(0))
        gc.collect()
        saved.clear()
        for seed in range(1, 4):
            contents = (png(9)[:60], png(seed), png(seed + 10))
            files = [("image", ("a.png", content)) for content in contents]
            assert (await client.post(path, files=files)).status_code == status
        gc.collect()
        assert [one for one in saved if isinstance(one, PICTURES)] == []
