"""Files of pictures, the same in training and in the service: formats, and what RGB they give."""

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def to_rgb(picture: Image.Image) -> Image.Image:
    """An opened picture -> RGB, 8 bits, upright.

    EXIF orientation is applied; transparency is laid over white; 16 bits, 32 bits and floats are
    scaled, not clipped; an animation gives its first frame.

    Raises:
        Exception: whatever Pillow's decoders raise on damaged content; they promise no kinds.
    """
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return _eight_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


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
