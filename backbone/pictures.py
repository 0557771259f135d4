"""Files of pictures, the same in training and in the service: formats, and what they give."""

from typing import Literal

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


Mode = Literal["L", "RGB", "RGBA"]  # grey, colours, colours with opacity


def to_rgb(picture: Image.Image) -> Image.Image:
    """An opened picture -> RGB; see `to_mode`."""
    return to_mode(picture, "RGB")


def to_mode(picture: Image.Image, mode: Mode) -> Image.Image:
    """An opened picture, which is not to be used again -> `mode`, 8 bits, upright.

    EXIF orientation is applied; transparency is laid over white, or kept in RGBA; 16 bits, 32 bits
    and floats are scaled, not clipped; an animation gives its first frame.

    Raises:
        Exception: whatever Pillow's decoders raise on damaged content; they promise no kinds.
    """
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)  # else it is copied, whatever stands there
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = _eight_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if mode != "RGBA":
            picture = over_white(picture)
    return picture if picture.mode == mode else picture.convert(mode)


def over_white(picture: Image.Image) -> Image.Image:
    """An RGBA picture -> RGB, its transparency laid over white; others as they are."""
    if picture.mode != "RGBA":
        return picture
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and float grey, where converting would clip it.

    In place and in single precision: the picture may be a large one.
    """
    values = np.nan_to_num(np.array(picture, dtype=np.float32), copy=False)
    if picture.mode.startswith("I;16"):
        top = 65535.0
    else:  # the format does not say what white is: the least usual range that holds the values
        usual = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0)
        brightest = float(values.max())
        top = next((limit for limit in usual if brightest <= limit), brightest)
    values /= np.float32(top)
    values *= np.float32(255.0)
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8)).convert("RGB")
