"""Pictures for tests, as bytes in every format and as what a client sends."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def noise(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture unlike that of any other seed, smooth enough to survive JPEG."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> Image.Image:
    picture = plain(left, (32, 16))
    picture.paste(right, (16, 0, 32, 16))
    return picture


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    return encoded(noise(seed, size))


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{as_base64(content)}"


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def opened(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def upright_and_turned(orientation: int, kind: str, **options: Any) -> tuple[Image.Image, bytes]:
    """A picture, and a file that shows it by way of the given EXIF orientation alone."""
    upright = halves(RED, BLUE)
    upright.paste(GREEN, (0, 8, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return upright, encoded(upright.transpose(_UNDO[orientation]), kind, exif=exif, **options)
