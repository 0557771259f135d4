"""Pictures of real sizes for `serving.py`, and as many files of one picture as are wanted."""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = {"jpeg": (500, 375), "jpeg_12mp": (4000, 3000), "png_2mp": (1640, 1230)}
"""Width and height of each kind in pixels."""


def make_pictures(data: Path, counts: dict[str, int]) -> dict[str, list[bytes]]:
    """Encoded pictures of each kind, from the photographs in `data`, or synthetic ones.

    The large ones are photographs enlarged to fill the frame, with a sensor's noise on top: an
    enlargement alone has no detail and is decoded too fast.
    """
    files = sorted(data.glob("*.jpg"))
    made: dict[str, list[bytes]] = {}
    for kind, count in counts.items():
        made[kind] = []
        for i in range(count):
            rng = np.random.default_rng(i)
            if files:
                with Image.open(files[i * len(files) // count]) as opened:
                    picture = opened.convert("RGB")
            else:
                picture = synthetic(rng)
            made[kind].append(encode(fill(picture, KINDS[kind]), kind, rng))
    return made


def fill(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = (math.ceil(side * scale) for side in picture.size)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    large = picture.resize((width, height), Image.Resampling.BICUBIC)
    return large.crop((left, top, left + size[0], top + size[1]))


def encode(picture: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    if kind == "jpeg":
        picture.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
    tile = rng.normal(0, 3.0, (512, 512, 1)).astype(np.float32)
    repeats = (picture.height // 512 + 1, picture.width // 512 + 1, 1)
    noise = np.tile(tile, repeats)[: picture.height, : picture.width]
    noisy = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    if kind == "png_2mp":
        noisy.save(buffer, "PNG")
    else:
        noisy.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def synthetic(rng: np.random.Generator) -> Image.Image:
    """Shapes at several scales, 500 x 375."""
    total = np.zeros((375, 500, 3))
    for scale in (2, 5, 13, 31):
        noise = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
        large = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
        total += np.asarray(large, dtype=float) / 4
    return Image.fromarray(total.astype(np.uint8))


def without_end(pictures: list[bytes], *, seed: int) -> Iterator[bytes]:
    """The pictures in turn, each time with other bytes and the same pixels.

    So no cache can answer: a comment that nobody reads holds a number of its own.
    """
    number = seed << 32
    while True:
        for content in pictures:
            number += 1
            yield marked(content, number)


def marked(content: bytes, number: int) -> bytes:
    """A JPEG with a comment, or a PNG with a chunk of text, behind its first marker."""
    mark = struct.pack(">Q", number)
    if content.startswith(b"\xff\xd8"):
        return content[:2] + b"\xff\xfe\x00\x0a" + mark + content[2:]
    body = b"tEXtComment\0" + mark.hex().encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    header_end = 8 + 25  # signature and IHDR
    return content[:header_end] + chunk + content[header_end:]
