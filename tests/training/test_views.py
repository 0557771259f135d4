"""Drawing and doing apart give what drawing while doing gave."""

import hashlib
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter, ImageOps

from tests.training.conftest import picture
from training.augmentations import (
    Bytes,
    View,
    draw_views,
    multi_crop,
    normalise,
    random_box,
    render,
    render_views,
)
from training.config import Crops

CROPS = Crops(global_size=24, local_count=3, local_size=10)


def drawn_while_doing(
    source: Image.Image,
    rng: random.Random,
    size: int,
    scale: tuple[float, float],
    blur: float,
    solarize: float,
) -> Bytes:
    """The recipe's augmentation of one crop as a single sequence of draws and operations."""
    box = random_box(source.width, source.height, scale, rng)
    crop = source.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    if rng.random() < 0.8:
        jitter = [
            (tv.adjust_brightness, rng.uniform(0.6, 1.4)),
            (tv.adjust_contrast, rng.uniform(0.6, 1.4)),
            (tv.adjust_saturation, rng.uniform(0.8, 1.2)),
            (tv.adjust_hue, rng.uniform(-0.1, 0.1)),
        ]
        rng.shuffle(jitter)
        for adjust, strength in jitter:
            crop = adjust(crop, strength)
    if rng.random() < 0.2:
        crop = crop.convert("L").convert("RGB")
    if rng.random() < blur:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if solarize and rng.random() < solarize:
        crop = ImageOps.solarize(crop)
    return np.asarray(crop).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(50, 40), (7, 90), (1, 1), (131, 97)])
def test_multi_crop_is_bit_for_bit_what_drawing_while_doing_gives(size: tuple[int, int]) -> None:
    for seed in range(25):
        source = picture(seed, size)
        rng, ours = random.Random(seed), random.Random(seed)
        expected = [
            drawn_while_doing(source, rng, 24, CROPS.global_scale, 1.0, 0.0),
            drawn_while_doing(source, rng, 24, CROPS.global_scale, 0.1, 0.2),
            *(drawn_while_doing(source, rng, 10, CROPS.local_scale, 0.5, 0.0) for _ in range(3)),
        ]
        global_crops, local_crops = multi_crop(source, CROPS, ours)
        assert all(map(np.array_equal, [*global_crops, *local_crops], expected))
        assert ours.random() == rng.random()  # as many draws


def test_what_a_seed_means_is_frozen() -> None:
    """The views of some seeds: a change here changes every run, and breaks resuming."""
    views = [
        view
        for seed in range(20)
        for view in draw_views(90 + 7 * seed, 120 - seed, CROPS, random.Random(seed))
    ]
    told = [
        (
            [int(edge) for edge in view.box],
            view.flip,
            [(operation, f"{strength:.9f}") for operation, strength in view.jitter],
            view.grey,
            view.blur_radius and f"{view.blur_radius:.9f}",
            view.solarize,
        )
        for view in views
    ]
    assert hashlib.sha256(repr(told).encode()).hexdigest()[:16] == "b2ca6a22462d4d92"


PLAIN = View(
    size=12,
    box=(3, 2, 33, 30),
    flip=True,
    jitter=(("contrast", 1.3), ("hue", 0.1), ("saturation", 0.8), ("brightness", 0.7)),
    grey=True,
    blur_radius=1.2,
    solarize=True,
)


def test_bands_are_done_alike_and_without_colour() -> None:
    bands = picture(3, (40, 32)).split()
    found = render(bands, PLAIN)
    assert found.shape == (3, 12, 12)
    for band, channel in zip(bands, found, strict=True):
        crop = band.resize((12, 12), Image.Resampling.BICUBIC, box=PLAIN.box)
        crop = tv.adjust_contrast(ImageOps.mirror(crop), 1.3)
        crop = tv.adjust_brightness(crop, 0.7).filter(ImageFilter.GaussianBlur(1.2))
        assert np.array_equal(channel, np.asarray(ImageOps.solarize(crop)))
        assert np.array_equal(render(band, PLAIN), channel[None])


def test_shapes_of_other_counts_of_channels() -> None:
    few = Crops(global_size=12, local_count=0, local_size=6)
    for source, channels in (
        (picture(0).convert("L"), 1),
        (picture(0).convert("RGBA").split(), 4),
        ([picture(0).convert("L")] * 5, 5),
    ):
        rng = random.Random(0)
        global_crops, local_crops = multi_crop(source, few, rng)
        assert global_crops.shape == (2, channels, 12, 12)
        assert local_crops.shape == (0, channels, 6, 6)
        views = draw_views(24, 20, few, random.Random(0))
        assert np.array_equal(render_views(source, views, few)[0], global_crops)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_normalise_takes_a_mean_and_a_deviation_for_each_channel(channels: int) -> None:
    mean = torch.linspace(0.2, 0.8, channels).reshape(-1, 1, 1)
    std = torch.linspace(0.1, 0.4, channels).reshape(-1, 1, 1)
    crops = torch.randint(0, 256, (3, 2, channels, 4, 4), dtype=torch.uint8)
    for c, channel in enumerate(normalise(crops, mean, std).unbind(dim=2)):
        expected = (crops[:, :, c] / 255 - mean[c]) / std[c]
        torch.testing.assert_close(channel, expected)
