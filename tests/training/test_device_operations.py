"""Each operation alone against Pillow's, through torchvision where the recipe uses that.

The tolerance of an operation, in levels: the largest difference that is allowed anywhere, and the
mean one. Most are exact on the CPU; 1 level is left for devices that round otherwise. Blur is exact
too, but for radii at which many sums are ties (1.0 and 2.0), as a recipe's random ones hardly are.
"""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter, ImageOps

from training.device_operations import (
    OPERATIONS,
    bicubic_weights,
    box_radius,
    crop_and_resize,
    hue_steps,
    luminance,
)

Adjust = Callable[[Image.Image, float], Image.Image]
MEAN = 0.02  # of a level


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Fine and coarse noise: every level, hard edges, and grey areas."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    values[: height // 2] = np.asarray(coarse.resize((width, height)))[: height // 2]
    values[:, : width // 5] = values[:, : width // 5, :1]
    return Image.fromarray(values)


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """[n, C, H, W], float32."""
    values = np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float()


def close(found: torch.Tensor, expected: torch.Tensor, largest: int, mean: float = MEAN) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found, found.round())
    assert found.min() >= 0
    assert found.max() <= 255
    difference = (found - expected).abs()
    assert difference.max() <= largest
    assert difference.mean() <= mean


OPERATION_TESTS: dict[str, tuple[Adjust, Callable[[float], float], list[float], int]] = {
    "brightness": (tv.adjust_brightness, float, [0.6, 0.77, 1.0, 1.2345, 1.4], 1),
    "contrast": (tv.adjust_contrast, float, [0.6, 0.77, 1.0, 1.2345, 1.4], 1),
    "saturation": (tv.adjust_saturation, float, [0.8, 0.93, 1.0, 1.07, 1.2], 1),
    "hue": (tv.adjust_hue, hue_steps, [-0.1, -0.05, 0.0, 0.003, 0.0123, 0.1], 1),
    "grey": (lambda p, _: p.convert("L").convert("RGB"), float, [0.0], 0),
    "blur": (
        lambda p, radius: p.filter(ImageFilter.GaussianBlur(radius)),
        box_radius,
        [0.1, 0.35, 0.7, 1.41, 1.5, 1.99, 3.3],
        1,
    ),
    "solarize": (lambda p, _: ImageOps.solarize(p, threshold=128), float, [0.0], 0),
}


@pytest.mark.parametrize("name", OPERATION_TESTS)
@pytest.mark.parametrize("size", [(41, 37), (1, 23), (24, 1), (2, 3)])
def test_every_operation_is_pillows(name: str, size: tuple[int, int]) -> None:
    adjust, strength_of, strengths, largest = OPERATION_TESTS[name]
    pictures = [noise(i, *size) for i in range(len(strengths))]
    expected = tensor([adjust(p, s) for p, s in zip(pictures, strengths, strict=True)])
    given = tensor(pictures)
    kept = given.clone()
    strength = torch.tensor([strength_of(s) for s in strengths]).float().view(-1, 1, 1, 1)
    close(OPERATIONS[name](given, strength), expected, largest)
    assert torch.equal(given, kept)


def test_blur_where_most_sums_are_ties() -> None:
    for radius in (1.0, 2.0):
        picture = noise(0, 41, 37)
        expected = tensor([picture.filter(ImageFilter.GaussianBlur(radius))])
        strength = torch.full((1, 1, 1, 1), box_radius(radius))
        close(OPERATIONS["blur"](tensor([picture]), strength), expected, 2, mean=0.3)


def test_there_is_a_test_of_every_operation() -> None:
    assert set(OPERATION_TESTS) == set(OPERATIONS)


def test_hue_of_every_kind_of_colour() -> None:
    steps = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)
    picture = Image.fromarray(colours.reshape(-1, len(steps), 3))
    for turns in (-0.1, -0.031, 0.0, 0.07):
        strength = torch.full((1, 1, 1, 1), float(hue_steps(turns)))
        expected = tensor([tv.adjust_hue(picture, turns)])
        close(OPERATIONS["hue"](tensor([picture]), strength), expected, 1)


def test_luminance_is_exact() -> None:
    picture = noise(3, 64, 64)
    assert torch.equal(luminance(tensor([picture])), tensor([picture.convert("L")]))


@pytest.mark.parametrize("name", ["brightness", "contrast", "blur", "solarize"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_are_done_each_on_its_own(name: str, channels: int) -> None:
    adjust, strength_of, strengths, largest = OPERATION_TESTS[name]
    bands = [noise(i, 19, 21).convert("L") for i in range(channels)]
    expected = torch.cat([tensor([adjust(band, strengths[0])]) for band in bands], dim=1)
    strength = torch.full((1, 1, 1, 1), strength_of(strengths[0]))
    given = torch.cat([tensor([band]) for band in bands], dim=1)
    close(OPERATIONS[name](given, strength), expected, largest)


BOXES = [
    ((50, 40), (0, 0, 50, 40)),
    ((50, 40), (7, 3, 46, 40)),
    ((33, 80), (5, 11, 12, 15)),  # enlarged
    ((80, 33), (79, 32, 80, 33)),  # one pixel, in a corner
    ((1, 60), (0, 10, 1, 60)),
    ((61, 1), (2, 0, 61, 1)),
    ((16, 16), (0, 0, 16, 16)),  # as it is
    ((70, 90), (3.25, 7.5, 60.125, 80.75)),  # in a reduced picture boxes are not whole
]


@pytest.mark.parametrize("size", [16, 7, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_cropping_and_resizing(size: int, flip: bool) -> None:
    """Pictures of all sizes on one canvas, whose rest is not to be seen in any crop.

    Pillow is made to do rows, then columns: on its own it has another order for tall pictures from
    version 13 on, and rounds otherwise in between.
    """
    canvas = torch.full((len(BOXES), 3, 95, 93), 255, dtype=torch.uint8)
    expected = []
    for i, ((width, height), box) in enumerate(BOXES):
        picture = noise(i, width, height)
        canvas[i, :, :height, :width] = tensor([picture])[0].byte()
        left, top, right, bottom = box
        rows = picture.resize((size, height), Image.Resampling.BICUBIC, (left, 0, right, height))
        crop = rows.resize((size, size), Image.Resampling.BICUBIC, (0, top, size, bottom))
        mirrored = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected.append([crop, mirrored if flip else crop])
    found = crop_and_resize(
        canvas,
        torch.tensor([[height, width] for (width, height), _ in BOXES]).double(),
        torch.tensor([[box, box] for _, box in BOXES]).double(),
        torch.tensor([[False, flip]]).expand(len(BOXES), 2),
        size,
    )
    for view in range(2):
        close(found[view], tensor([crops[view] for crops in expected]), 1)


def test_tall_pictures_differ_by_pillows_order_of_rows_and_columns_alone() -> None:
    """Tolerance: 0.5 levels in the mean."""
    picture = noise(3, 40, 200)
    expected = tensor([picture.resize((16, 16), Image.Resampling.BICUBIC, (3, 20, 38, 60))])
    found = crop_and_resize(
        tensor([picture]).byte(),
        torch.tensor([[200, 40]]).double(),
        torch.tensor([[[3, 20, 38, 60]]]).double(),
        torch.tensor([[False]]),
        16,
    )
    assert (found[0] - expected).abs().mean() < 0.5


def test_weights_far_from_the_origin_are_exact() -> None:
    """Single precision in the thousands would lose a thousandth of a pixel."""
    rng = random.Random(0)
    low = rng.uniform(7000, 7900)
    low, high = torch.tensor([[low]]).double(), torch.tensor([[low + 65.4321]]).double()
    length = torch.tensor([[8000.0]]).double()
    weights = bicubic_weights(low, high, length, 8000, 9)[0, 0]
    whole = low.floor() - 100
    near = bicubic_weights(low - whole, high - whole, length - whole, 300, 9)[0, 0]
    first = int(whole.item())
    torch.testing.assert_close(weights[:, first : first + 300], near, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(9))
