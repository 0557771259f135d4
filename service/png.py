"""RGB -> PNG, fast: one filter for all rows, and Intel's deflate.

Pillow tries five filters on each row and compresses with zlib; that was most of the time of drawing
a map (docs/benchmarks.md). The file format: https://www.w3.org/TR/png-3.
"""

import struct

import numpy as np
from isal import isal_zlib
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP = 2  # the filter: each byte less the one above it, modulo 256
_LEVEL = 2


def encode(picture: Image.Image) -> bytes:
    """A lossless PNG of 8 bits for each of red, green and blue.

    Raises:
        ValueError: a picture of another mode than RGB.
    """
    if picture.mode != "RGB":
        raise ValueError(f"the picture's mode is {picture.mode!r}, not 'RGB'")
    width, height = picture.size
    pixels = np.asarray(picture).reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", isal_zlib.compress(rows, _LEVEL)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(name))
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
