import random

import numpy as np
import pytest
import torchvision.transforms.v2.functional as tv
from PIL import Image

from tests.training.conftest import picture
from training.jitter import ADJUST

TORCHVISION = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


def noise(size: tuple[int, int]) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("operation", "mode"),
    [*((name, "RGB") for name in ADJUST), ("brightness", "L"), ("contrast", "L")],
)
def test_bit_for_bit_torchvisions(operation: str, mode: str) -> None:
    rng = random.Random(operation)
    flat = [Image.new("RGB", (3, 5), color) for color in ("black", "white", (1, 128, 254))]
    for original in (noise((40, 30)), noise((1, 1)), picture(3), *flat):
        source = original.convert(mode)
        low, high = (-0.5, 0.5) if operation == "hue" else (0.0, 2.5)
        for strength in (
            low,
            high,
            0.0,
            1.0 if high > 1 else 0.1,
            *(rng.uniform(low, high) for _ in range(40)),
        ):
            ours = ADJUST[operation](source, strength)
            theirs = TORCHVISION[operation](source, strength)
            assert ours.mode == theirs.mode
            assert ours.tobytes() == theirs.tobytes(), (operation, strength)
