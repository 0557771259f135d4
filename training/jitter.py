"""Colour jitter with Pillow's core operations alone: bit for bit torchvision's, in less time."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image


def brightness(picture: Image.Image, factor: float) -> Image.Image:
    """Blends an RGB or L picture with black; 1 changes nothing."""
    return _blend_with(picture, 0, factor)


def contrast(picture: Image.Image, factor: float) -> Image.Image:
    """Blends an RGB or L picture with its mean grey; 1 changes nothing."""
    grey = np.asarray(picture if picture.mode == "L" else picture.convert("L"))
    return _blend_with(picture, int(int(grey.sum()) / grey.size + 0.5), factor)


def saturation(picture: Image.Image, factor: float) -> Image.Image:
    """Blends an RGB picture with itself in grey; 1 changes nothing."""
    return Image.blend(picture.convert("L").convert("RGB"), picture, factor)


def hue(picture: Image.Image, turns: float) -> Image.Image:
    """Turns the colours of an RGB picture, from -.5 to .5 of a whole turn."""
    hues, saturations, values = picture.convert("HSV").split()
    turned = np.asarray(hues) + np.uint8(int(turns * 255) % 256)  # goes round at 256
    hues = Image.frombytes("L", hues.size, turned.tobytes())
    return Image.merge("HSV", (hues, saturations, values)).convert("RGB")


ADJUST: Mapping[str, Callable[[Image.Image, float], Image.Image]] = MappingProxyType(
    {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
)


def _blend_with(picture: Image.Image, value: int, factor: float) -> Image.Image:
    color = value if picture.mode == "L" else (value, value, value)
    return Image.blend(Image.new(picture.mode, picture.size, color), picture, factor)
