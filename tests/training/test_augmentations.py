import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.training.conftest import picture
from training.augmentations import Bytes, multi_crop, normalise, random_box
from training.config import Crops

CROPS = Crops(global_size=16, local_count=3, local_size=8)
FEW = Crops(global_size=16, local_count=1, local_size=16, local_scale=(0.4, 1.0))
SEEDS = 250


def crops_of(source: Image.Image, seed: int, crops: Crops = FEW) -> list[Bytes]:
    """The crops of one picture: first global, second global, local ones."""
    return [crop for part in multi_crop(source, crops, random.Random(seed)) for crop in part]


def shares(source: Image.Image, holds: Callable[[Bytes], bool]) -> list[float]:
    """The share of the seeds for which each crop `holds`: first, second, local."""
    found = [[holds(crop) for crop in crops_of(source, seed)] for seed in range(SEEDS)]
    return np.mean(found, axis=0).tolist()


@pytest.mark.parametrize("size", [(50, 40), (7, 90), (16, 16), (1, 1), (300, 2)])
def test_shapes(size: tuple[int, int]) -> None:
    global_crops, local_crops = multi_crop(picture(1, size), CROPS, random.Random(0))
    assert global_crops.shape == (2, 3, 16, 16)
    assert local_crops.shape == (3, 3, 8, 8)
    assert global_crops.dtype == local_crops.dtype == np.uint8


def test_no_local_crops() -> None:
    crops = Crops(global_size=16, local_count=0, local_size=8)
    global_crops, local_crops = multi_crop(picture(1), crops, random.Random(0))
    assert global_crops.shape == (2, 3, 16, 16)
    assert local_crops.shape == (0, 3, 8, 8)


def test_the_generator_decides_everything() -> None:
    first, again, other = (crops_of(picture(2), seed, CROPS) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    torch.manual_seed(0)  # global states must not matter
    random.seed(0)
    np.random.seed(0)
    assert all(
        np.array_equal(a, b) for a, b in zip(first, crops_of(picture(2), 7, CROPS), strict=True)
    )


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    low=st.floats(0.01, 1.0),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32),
)
def test_boxes_keep_their_bounds(
    width: int, height: int, low: float, share: float, seed: int
) -> None:
    high = low + share * (1.0 - low)
    left, top, right, bottom = random_box(width, height, (low, high), random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    # The sides are rounded to whole pixels: each may be half a pixel off.
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    assert (w - 0.5) / (h + 0.5) <= 4 / 3
    area = width * height
    in_bounds = (w - 0.5) * (h - 0.5) <= high * area and (w + 0.5) * (h + 0.5) >= low * area
    fallback = (left, top) == ((width - w) // 2, (height - h) // 2) and (w == width or h == height)
    assert in_bounds or fallback


def test_boxes_use_their_whole_range() -> None:
    rng = random.Random(0)
    boxes = [random_box(400, 400, (0.05, 0.4), rng) for _ in range(500)]
    areas = [(r - l) * (b - t) / 160000 for l, t, r, b in boxes]  # noqa: E741
    ratios = [(r - l) / (b - t) for l, t, r, b in boxes]  # noqa: E741
    assert min(areas) < 0.07
    assert max(areas) > 0.38
    assert np.mean(areas) == pytest.approx(0.225, abs=0.02)
    assert min(ratios) < 0.78
    assert max(ratios) > 1.28


def test_only_the_second_global_crop_is_solarised() -> None:
    bright = Image.new("RGB", (20, 20), (250, 250, 250))  # jitter leaves it above 128
    first, second, local = shares(bright, lambda crop: bool((crop < 128).all()))
    assert (first, local) == (0.0, 0.0)
    assert second == pytest.approx(0.2, abs=0.07)


def test_the_first_global_crop_is_blurred_most_and_the_second_least() -> None:
    dots = np.random.default_rng(0).integers(0, 2, (16, 16, 1), dtype=np.uint8) * 255
    source = Image.fromarray(np.repeat(dots, 3, axis=2))
    crops = Crops(global_size=16, local_count=1, local_size=16, global_scale=(1, 1))
    crops = Crops(**{**vars(crops), "local_scale": (1, 1)})

    def sharpness(crop: Bytes) -> float:
        return float(np.abs(np.diff(crop.astype(np.float64), axis=2)).mean())

    every = [[sharpness(crop) for crop in crops_of(source, seed, crops)] for seed in range(SEEDS)]
    first, second, local = np.mean(every, axis=0)
    assert first < local - 5 < second - 10


def test_a_fifth_is_grey() -> None:
    colour = Image.new("RGB", (20, 20), (200, 60, 30))

    def grey(crop: Bytes) -> bool:
        return bool((crop[0] == crop[1]).all() and (crop[1] == crop[2]).all())

    assert shares(colour, grey) == pytest.approx([0.2] * 3, abs=0.07)


def test_half_is_flipped() -> None:
    ramp = np.broadcast_to(np.linspace(20, 120, 32)[None, :, None], (32, 32, 3))
    source = Image.fromarray(ramp.astype(np.uint8))

    def falling(crop: Bytes) -> bool:
        return bool(crop[..., 0].mean() > crop[..., -1].mean())

    first, _, local = shares(source, falling)
    assert [first, local] == pytest.approx([0.5] * 2, abs=0.09)


def test_four_fifths_are_jittered() -> None:
    even = Image.new("RGB", (20, 20), (100, 100, 100))
    first, _, local = shares(even, lambda crop: bool((crop != 100).all()))
    assert [first, local] == pytest.approx([0.8] * 2, abs=0.07)


def test_normalise() -> None:
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.1, 0.4)))
    crops = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    kept = crops.clone()
    expected = (crops.double() / 255 - mean.double()) / std.double()
    torch.testing.assert_close(normalise(crops, mean, std).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(crops, kept)
