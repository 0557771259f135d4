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
_ROWS = 512  # at a time, so that a large picture is not held three times


def encode(picture: Image.Image) -> bytes:
    """A lossless PNG of 8 bits for each of red, green and blue.

    Raises:
        ValueError: a picture of another mode than RGB.
    """
    if picture.mode != "RGB":
        raise ValueError(f"the picture's mode is {picture.mode!r}, not 'RGB'")
    width, height = picture.size
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    compressor = isal_zlib.compressobj(_LEVEL)
    compressed: list[bytes] = []
    above = np.zeros(3 * width, np.uint8)
    for start in range(0, height, _ROWS):
        band = picture.crop((0, start, width, min(height, start + _ROWS)))
        pixels = np.asarray(band).reshape(band.height, 3 * width)
        rows = np.empty((band.height, 1 + 3 * width), np.uint8)
        rows[:, 0] = _UP
        np.subtract(pixels[0], above, out=rows[0, 1:])
        np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
        compressed.append(compressor.compress(rows))
        above = pixels[-1]
    compressed.append(compressor.flush())
    content = b"".join(compressed)
    return b"".join(
        (_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", content), _chunk(b"IEND", b""))
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(name))
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
