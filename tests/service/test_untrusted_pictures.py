"""Pictures of every kind over HTTP: none may be the service's fault."""

import hashlib
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.images import FORMATS
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import (
    BLUE,
    GREEN,
    RED,
    as_base64,
    encoded,
    halves,
    noise,
    opened,
    plain,
    png,
    png_header,
    upright_and_turned,
)

pytestmark = pytest.mark.anyio
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def encoder(shared_encoder: FakeEncoder) -> FakeEncoder:
    shared_encoder.calls.clear()
    return shared_encoder


@pytest.fixture
def client(shared_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return shared_client


async def seen(client: httpx.AsyncClient, content: bytes) -> np.ndarray:
    """The picture as the service sees it, [H, W, 3]: attention without any overlay."""
    response = await client.post(
        "/v1/attention", content=content, headers=RAW, params={"overlay": 0}
    )
    assert response.status_code == 200, response.text
    return np.asarray(opened(response.content)).astype(int)


def far(one: np.ndarray, picture: Image.Image) -> float:
    return float(np.abs(one - np.asarray(picture.convert("RGB"), dtype=int)).max())


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 8),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 12),
        ("GIF", {}, 60),
    ],
)
async def test_every_format(
    client: httpx.AsyncClient, kind: str, options: dict[str, Any], tolerance: int
) -> None:
    assert far(await seen(client, encoded(noise(1), kind, **options)), noise(1)) <= tolerance


@pytest.mark.parametrize("kind", ["AVIF", "GIF", "PNG", "TIFF", "WEBP"])
async def test_the_first_frame_of_several(client: httpx.AsyncClient, kind: str) -> None:
    frames = [plain(GREEN), plain(BLUE)]
    content = encoded(plain(RED), kind, save_all=True, append_images=frames)
    assert getattr(opened(content), "n_frames", 1) == 3
    assert far(await seen(client, content), plain(RED)) <= 4


def transparent_red(mode: str) -> tuple[bytes, Image.Image]:
    picture = plain(RED).convert("RGBA")
    picture.putalpha(0)
    picture.paste((*RED, 255), (0, 0, 12, 16))
    options: dict[str, Any] = {}
    if mode == "P":
        palette = halves(RED, GREEN).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        picture = palette.resize((24, 16), Image.Resampling.NEAREST)
        options = {"transparency": picture.getpixel((20, 5))}
    expected = plain((255, 255, 255))
    expected.paste(RED, (0, 0, 12, 16))
    return encoded(picture, "PNG", **options), expected


def grey_ramp() -> tuple[bytes, Image.Image]:
    ramp = np.linspace(0, 65535, 24).astype(np.uint16)[None].repeat(16, axis=0)
    return encoded(Image.fromarray(ramp)), Image.fromarray((ramp / 257).astype(np.uint8))


def cmyk() -> tuple[bytes, Image.Image]:
    content = encoded(plain(RED).convert("CMYK"), "JPEG", quality=95)
    assert opened(content).mode == "CMYK"
    return content, plain(RED)


@pytest.mark.parametrize(
    ("made", "tolerance"),
    [
        (transparent_red("RGBA"), 0),
        (transparent_red("P"), 0),
        (grey_ramp(), 1),
        (cmyk(), 6),
        ((encoded(plain(RED).convert("L")), plain(RED).convert("L")), 0),
        ((encoded(plain(RED).convert("LA")), plain(RED).convert("L")), 0),
        ((encoded(plain(RED).convert("1")), plain(RED).convert("1")), 0),
    ],
    ids=["alpha", "palette", "16 bits", "CMYK", "grey", "grey+alpha", "1 bit"],
)
async def test_every_mode(
    client: httpx.AsyncClient, made: tuple[bytes, Image.Image], tolerance: int
) -> None:
    content, expected = made
    assert far(await seen(client, content), expected) <= tolerance


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_exif_orientation(
    client: httpx.AsyncClient, orientation: int, kind: str, options: dict[str, Any]
) -> None:
    upright, content = upright_and_turned(orientation, kind, **options)
    assert far(await seen(client, content), upright) <= 12


@pytest.mark.parametrize("size", [(1, 1), (30_000, 1), (1, 30_000), (3, 200)])
async def test_odd_sizes_go_all_the_way(client: httpx.AsyncClient, size: tuple[int, int]) -> None:
    content = encoded(plain(RED, size))
    response = await client.post("/v1/embeddings", content=content, headers=RAW)
    assert len(json_of(response)["data"][0]["embedding"]) == 48
    long, short = max(size), min(size)
    drawn = await seen(client, content)
    assert max(drawn.shape[:2]) == min(long, 1024)
    assert min(drawn.shape[:2]) == max(1, round(short * min(1024, long) / long))
    for path in ("images", "search", "copies"):
        json_of(await client.post(f"/v1/collections/default/{path}", content=content, headers=RAW))
    record_id = hashlib.sha256(content).hexdigest()
    thumbnail = opened(
        (await client.get(f"/v1/collections/default/thumbnails/{record_id}")).content
    )
    assert max(thumbnail.size) == min(long, 192)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
FITS = b"".join(
    line.ljust(80)
    for line in (
        b"SIMPLE  =                    T",
        b"BITPIX  =                    8",
        b"NAXIS   =                    2",
        b"NAXIS1  =                    8",
        b"NAXIS2  =                    8",
        b"END",
    )
).ljust(2880) + bytes(2880)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
OTHER_FORMATS = ("DDS", "EPS", "ICNS", "ICO", "JPEG2000", "PCX", "PDF", "SGI", "TGA")
JPEG = encoded(noise(1, (64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_image"),
        (b"just some text", 415, "unsupported_image"),
        (b"\x00" * 1000, 415, "unsupported_image"),
        (SVG, 415, "unsupported_image"),
        (EPS, 415, "unsupported_image"),
        (FITS, 415, "unsupported_image"),
        *((encoded(noise(1), kind), 415, "unsupported_image") for kind in OTHER_FORMATS),
        (JPEG[: len(JPEG) // 2], 400, "invalid_image"),
        (JPEG[:20], 415, "unsupported_image"),
        (png(1)[:60], 400, "invalid_image"),
        (png_header(10, 10), 400, "invalid_image"),
        (png_header(60_000, 60_000), 413, "image_too_large"),
        (png_header(11_000, 10_000), 413, "image_too_large"),
        (png_header(2**31 - 1, 2**31 - 1), 413, "image_too_large"),
        (png_header(0, 10), 415, "unsupported_image"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else None,
)
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
async def test_what_is_refused(
    client: httpx.AsyncClient, encoder: FakeEncoder, content: bytes, status: int, code: str
) -> None:
    for path, param, request in (
        ("/v1/embeddings", "body", {"content": content, "headers": RAW}),
        ("/v1/attention", "image[0]", {"files": {"image": ("cat.jpg", content, "image/jpeg")}}),
        ("/v1/collections/default/search", "image", {"json": {"image": as_base64(content)}}),
    ):
        error = error_of(await client.post(path, **request), status, code)
        assert error["param"] == param
        assert error["message"].startswith(param)
    assert encoder.calls == []


def test_pillow_itself_would_open_what_is_refused() -> None:
    for content, kind in ((FITS, "FITS"), (EPS, "EPS"), (encoded(noise(1), "TGA"), "TGA")):
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == kind


async def test_the_files_name_and_told_type_do_not_matter(client: httpx.AsyncClient) -> None:
    for name, kind in (("cat.exe", "text/plain"), ("../../etc/passwd", "image/svg+xml"), ("a", "")):
        files = {"image": (name, png(1), kind)}
        json_of(await client.post("/v1/embeddings", files=files))


@pytest.mark.parametrize("kind", FORMATS)
async def test_files_that_are_cut_short(client: httpx.AsyncClient, kind: str) -> None:
    content = encoded(noise(1, (64, 48)), kind)
    for share in (0.1, 0.5, 0.9, 0.99):
        cut = content[: int(share * len(content))]
        response = await client.post("/v1/embeddings", content=cut, headers=RAW)
        error_of(response, response.status_code)
        assert response.status_code in (400, 415), share


async def test_the_whole_content_decides_what_is_the_same(client: httpx.AsyncClient) -> None:
    """Pictures that differ in what comes after the picture alone are two."""
    url = "/v1/collections/default/images"
    start = encoded(noise(77, (300, 200)), "BMP")
    for tail in (b"1", b"2"):
        stored = json_of(await client.post(url, content=start + tail, headers=RAW))["images"][0]
        assert (stored["outcome"], stored["id"]) == (
            "created",
            hashlib.sha256(start + tail).hexdigest(),
        )


async def test_identifiers_are_no_paths(serve: Serve, tmp_path: Path) -> None:
    async with serve() as client:
        before = {p for p in tmp_path.rglob("*") if "default" not in p.parts}
        for i, record_id in enumerate(("../../../escaped", "/escaped", "a/../../escaped", "C:\\x")):
            body = {"images": [{"image": as_base64(png(i)), "id": record_id}]}
            answer = await client.post("/v1/collections/default/images", json=body)
            assert json_of(answer)["images"][0]["id"] == record_id
        for name in ("..%2Fescaped", "%2Fescaped", "a%2F..%2F..%2Fescaped", ".", "a%00b"):
            response = await client.put(f"/v1/collections/{name}")
            assert response.status_code in (400, 404, 405), response.text
            error_of(response, response.status_code)
        after = {p for p in tmp_path.rglob("*") if "default" not in p.parts}
        assert after == before
        assert not list(tmp_path.parent.rglob("*escaped*"))
