"""Reduced-scale decoding, and pictures of other channels than three."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import ROOT, picture
from training.augmentations import Bytes, View, draw_views, picture_size, render, render_views
from training.config import Crops
from training.decoding import (
    count_pixels,
    decode,
    decode_channels,
    decode_views,
    reduction_for,
    to_array,
)
from training.sources import DataError, open_pictures

CROPS = Crops(global_size=48, local_count=4, local_size=16, local_scale=(0.1, 0.4))
PHOTOS = ROOT.parent / "shared" / "data" / "photos"


def encoded(source: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, form, **options)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def drawing(seed: int, crops: Crops = CROPS) -> Callable[[int, int], list[View]]:
    return lambda width, height: draw_views(width, height, crops, random.Random(seed))


def crops_of(content: bytes, seed: int, *, channels: int = 3) -> tuple[list[Bytes], list[Bytes]]:
    """The crops from what `decode_views` decodes, and from the whole picture."""
    reduced, views = decode_views(content, "x", drawing(seed), channels=channels)
    if channels == 3:
        whole: Image.Image | tuple[Image.Image, ...] = decode(content, "x")
    else:
        bands = decode_channels(content, "x", channels)
        whole = tuple(Image.fromarray(band) for band in bands)
    expected = drawing(seed)(*picture_size(whole))
    return [render(reduced, v) for v in views], [render(whole, v) for v in expected]


def check_close(found: list[Bytes], expected: list[Bytes]) -> None:
    """Tolerance: 1.5 levels in the mean of a crop, and 38 dB (a JPEG of quality 90 has less)."""
    for ours, theirs in zip(found, expected, strict=True):
        difference = ours.astype(np.float64) - theirs
        assert np.abs(difference).mean() < 1.5
        assert 10 * np.log10(255**2 / max((difference**2).mean(), 1e-9)) > 38


def textured(width: int, height: int) -> Image.Image:
    """Shapes of all sizes with some grain, as a photograph has."""
    rng = np.random.default_rng(0)
    values = np.zeros((height, width, 3), np.float64)
    for size, weight in ((4, 0.5), (24, 0.25), (120, 0.15)):
        grid = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        values += weight * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    values += rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_large_jpeg_is_decoded_smaller_and_its_crops_are_the_same(factor: int) -> None:
    # Odd sides: the reduced ones are rounded up.
    source = textured(320 * factor + 1, 250 * factor + factor - 1)
    content = encoded(source, quality=92)
    reduced, _ = decode_views(content, "x", drawing(1))
    assert picture_size(reduced)[0] <= -(-source.width // factor)
    check_close(*crops_of(content, 1))


def test_real_photographs_decoded_smaller() -> None:
    if not PHOTOS.exists():
        pytest.skip(f"{PHOTOS.name} is not in {PHOTOS.parent}")
    smaller = 0
    for seed, path in enumerate(sorted(PHOTOS.glob("*.jpg"))[::25]):
        content = path.read_bytes()
        reduced, _ = decode_views(content, path.name, drawing(seed))
        smaller += picture_size(reduced) != decode(content, path.name).size
        check_close(*crops_of(content, seed))
    assert smaller > 10


@pytest.mark.parametrize("size", [(64, 48), (100, 75), (1, 1), (9, 130)])
def test_small_pictures_are_not_touched(size: tuple[int, int]) -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        content = encoded(picture(2, size), form)
        for shrink in (False, True):
            found, views = decode_views(content, "x", drawing(3), shrink=shrink)
            assert views == drawing(3)(*size)
            assert np.array_equal(to_array(found), to_array(decode(content, "x")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_views_lie_in_the_upright_picture(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(textured(640, 400), form, exif=exif)
    sizes = []

    def draw(width: int, height: int) -> list[View]:
        sizes.append((width, height))
        return drawing(4)(width, height)

    reduced, views = decode_views(content, "x", draw, shrink=True)
    assert sizes == [(640, 400) if orientation < 5 else (400, 640)]
    assert picture_size(reduced) == tuple(side // 2 for side in sizes[0])
    whole = decode(content, "x")
    assert whole.size == sizes[0]
    expected = [render(whole, view) for view in drawing(4)(*whole.size)]
    check_close([render(reduced, view) for view in views], expected)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_modes(mode: str) -> None:
    check_close(*crops_of(encoded(textured(700, 500).convert(mode)), 0))


def test_progressive_jpegs() -> None:
    check_close(*crops_of(encoded(textured(700, 500), progressive=True), 0))


def test_the_reduction_leaves_every_view_two_pixels_for_each_of_its_own() -> None:
    def view(side: int, size: int) -> View:
        return View(
            size=size, box=(5, 5, 5 + side, 5 + 2 * side), flip=False, jitter=(), grey=False,
            blur_radius=None, solarize=False,
        )  # fmt: skip

    sides = {15: 1, 39: 1, 40: 2, 79: 2, 80: 4, 160: 8, 4000: 8}
    assert {side: reduction_for([view(side, 10)]) for side in sides} == sides
    assert reduction_for([view(4000, 10), view(50, 12)]) == 2


def test_a_bug_in_drawing_is_not_a_bad_picture() -> None:
    def draw(width: int, height: int) -> list[View]:
        raise RuntimeError("a bug")

    for form in ("JPEG", "PNG"):
        with pytest.raises(RuntimeError, match="a bug"):
            decode_views(encoded(picture(0), form), "x", draw)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_broken_pictures_are_named(form: str, channels: int) -> None:
    content = encoded(textured(400, 300), form)
    for broken in (b"", b"text", content[:9], content[: len(content) // 2]):
        with pytest.raises(DataError, match="album/7"):
            decode_views(broken, "album/7", drawing(0), channels=channels)
        with pytest.raises(DataError, match="album/7"):
            decode_channels(broken, "album/7", channels)


def test_one_channel_is_grey() -> None:
    source = picture(1, (40, 30))
    for mode in ("L", "RGB", "CMYK", "P"):
        content = encoded(source.convert(mode), "TIFF")
        found = decode_channels(content, "x", 1)
        expected = decode(content, "x").convert("L")
        assert np.array_equal(found, np.asarray(expected)[None])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_scale(form: str) -> None:
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    found = decode_channels(encoded(Image.fromarray(values), form), "x", 1)
    assert np.abs(found[0] - values / 257).max() <= 1
    assert found.min() == 0
    assert found.max() == 255


def test_four_channels_are_rgba_as_they_are() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    values[:5, :, 3] = 0  # what cannot be seen keeps its colour
    found = decode_channels(encoded(Image.fromarray(values), "PNG"), "x", 4)
    assert np.array_equal(found, values.transpose(2, 0, 1))
    opaque = decode_channels(encoded(picture(0), "PNG"), "x", 4)
    assert np.array_equal(opaque[:3], to_array(picture(0)))
    assert (opaque[3] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_channels(encoded(Image.fromarray(values), "PNG", exif=exif), "x", 4)
    assert np.array_equal(turned, np.rot90(values, -1).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_numpy_files_of_any_count_of_channels(channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (90, 110, channels), dtype=np.uint8)
    (tmp_path / "a.npy").write_bytes(npy(values))
    pictures = open_pictures([tmp_path])
    assert pictures.names == ["a.npy"]
    content = pictures.read(0)
    assert count_pixels(content, "a") == 90 * 110
    assert np.array_equal(decode_channels(content, "a", channels), values.transpose(2, 0, 1))
    found, views = decode_views(content, "a", drawing(0), channels=channels)
    global_crops, local_crops = render_views(found, views, CROPS)
    assert global_crops.shape == (2, channels, 48, 48)
    assert local_crops.shape == (4, channels, 16, 16)


def test_numpy_files_of_one_channel_need_no_axis_for_it() -> None:
    values = np.random.default_rng(1).integers(0, 256, (9, 11), dtype=np.uint8)
    assert np.array_equal(decode_channels(npy(values), "a", 1), values[None])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((4, 5, 5), np.uint8), "has 5 channels where data.channels = 7"),
        (np.zeros((4, 5, 7), np.float32), r"float32 \[4, 5, 7\].*must hold uint8"),
        (np.zeros((2, 4, 5, 7), np.uint8), r"must hold uint8 \[H, W\]"),
        (np.zeros((0, 5, 7), np.uint8), "must hold uint8"),
        (np.array([{}], dtype=object), "allow_pickle=False"),
    ],
    ids=["channels", "type", "axes", "empty", "pickle"],
)
def test_numpy_files_that_are_something_else(values: np.ndarray, said: str) -> None:
    with pytest.raises(DataError, match=f"'a/b.npy' .*{said}"):
        decode_channels(npy(values), "a/b.npy", 7)


def test_pictures_of_another_count_of_channels() -> None:
    with pytest.raises(DataError, match=r"'x' .*PNG.*data.channels = 6.*\.npy"):
        decode_channels(encoded(picture(0), "PNG"), "x", 6)
    with pytest.raises(DataError, match="has 2 channels where 3"):
        decode(npy(np.zeros((4, 4, 2), np.uint8)), "x")
