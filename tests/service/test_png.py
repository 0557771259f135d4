import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service import png
from service.helper import Helper


def encode(picture: Image.Image) -> bytes:
    return png.encode(picture.size, png.rows_of(picture))


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 7), (7, 1), (3, 2), (500, 375), (3, 512), (5, 1025), (140000, 1), (1, 70000)],
)
@pytest.mark.parametrize("kind", ["noise", "grey", "slope"])
def test_the_picture_comes_back(size: tuple[int, int], kind: str) -> None:
    width, height = size
    pixels = {
        "noise": np.random.default_rng(0).integers(256, size=(height, width, 3)),
        "grey": np.full((height, width, 3), 128),
        "slope": np.indices((height, width, 3)).sum(axis=0) * 3 % 256,
    }[kind].astype(np.uint8)

    content = encode(Image.fromarray(pixels))

    found = Image.open(io.BytesIO(content))
    assert (found.format, found.mode, found.size) == ("PNG", "RGB", size)
    assert np.array_equal(np.asarray(found), pixels)
    Image.open(io.BytesIO(content)).verify()  # the checksums


@pytest.mark.parametrize("size", [(500, 375), (200, 1600), (500, 2048), (300, 100)])
def test_bands_that_others_compress_make_the_same_file(size: tuple[int, int]) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(256, size=(height, width, 3)).astype(np.uint8)
    rows = png.rows_of(Image.fromarray(noise))
    helper = Helper()
    parts: list[object] = []

    def both(one: Any, other: Any) -> Any:
        parts.append(one)
        return helper.both(one, other)

    try:
        assert png.encode(size, rows, both=both) == png.encode(size, rows)
    finally:
        helper.close()
    assert len(parts) == {375: 1, 1600: 2, 2048: 2, 100: 0}[height]


def test_a_wrong_checksum_would_be_seen() -> None:
    content = bytearray(encode(Image.new("RGB", (8, 8), "red")))
    content[-40] ^= 1  # in the pixels' last chunk

    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(content)).verify()


def test_it_is_not_much_larger_than_pillows() -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((480, 360), Image.Resampling.BICUBIC)).astype(int)
    pixels = (smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
    picture, theirs = Image.fromarray(pixels), io.BytesIO()
    picture.save(theirs, "PNG")

    assert len(encode(picture)) < 1.2 * len(theirs.getvalue())


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="'L', not 'RGB'"):
        encode(Image.new("L", (2, 2)))
