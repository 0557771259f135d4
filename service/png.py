"""RGB -> PNG, fast: one filter for all rows, Intel's deflate, and two threads at once.

Pillow tries five filters on each row and compresses with zlib; that was most of the time of drawing
a map (docs/benchmarks.md). The file format: https://www.w3.org/TR/png-3.
"""

import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from PIL import Image

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
Rows = Callable[[int, int], Image.Image]
"""The rows of a picture from one up to, and without, another one."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEFLATE = b"\x78\x01"  # what follows is compressed, with a window of 32 KiB, fast
_UP = 2  # the filter: each byte less the one above it, modulo 256
_LEVEL = 2
_MOST_ROWS = 1024  # at a time, so that a large picture is not held three times
_WORTH_IT = 2**17  # pixels, at least: fewer are sooner compressed than handed over
_ADLER = 65521  # the largest prime below 2^16


class Both(Protocol):
    """Does two pieces of work side by side."""

    def __call__(self, one: Callable[[], T], other: Callable[[], T]) -> tuple[T, T]:
        """Their results; `other` is done by the calling thread."""


def in_turn(one: Callable[[], T], other: Callable[[], T]) -> tuple[T, T]:
    """`Both` in one thread."""
    return one(), other()


def rows_of(picture: Image.Image) -> Rows:
    """Those of a picture that is there as a whole."""

    def rows(top: int, bottom: int) -> Image.Image:
        is_whole = (top, bottom) == (0, picture.height)
        return picture if is_whole else picture.crop((0, top, picture.width, bottom))

    return rows


def encode(size: tuple[int, int], rows: Rows, *, both: Both = in_turn) -> bytes:
    """A lossless PNG of 8 bits for each of red, green and blue.

    Args:
        size: width and height in pixels.
        rows: makes a part of the picture; they are asked for from the top down.
        both: compresses two halves of what was painted; that alone, because it needs nothing of
            the interpreter's lock, which threads hand to each other more slowly than they paint.

    Raises:
        ValueError: rows of another mode than RGB.
    """
    width, height = size
    count = -(-height // _MOST_ROWS)
    bands: list[_Band] = []

    for i in range(count):
        top, bottom = height * i // count, height * (i + 1) // count
        pixels = _pixels(rows(top, bottom))
        if (bottom - top) * width < _WORTH_IT or bottom - top < 2:
            bands.append(_band(pixels, is_last=bottom == height))
            continue
        middle = (bottom - top) // 2
        bands += both(
            partial(_band, pixels[:middle], is_last=False),
            partial(_band, pixels[middle:], is_last=bottom == height),
        )
    adler = 1
    for band in bands:
        adler = _joined(adler, band.adler, band.length)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    parts = [
        _SIGNATURE,
        _chunk(b"IHDR", header),
        _chunk(b"IDAT", _DEFLATE),
        *(band.chunk for band in bands),
        _chunk(b"IDAT", struct.pack(">I", adler)),
        _chunk(b"IEND", b""),
    ]
    return b"".join(parts)


class _Band(NamedTuple):
    chunk: bytes
    adler: int  # of the filtered rows
    length: int  # of these, in bytes


def _pixels(picture: Image.Image) -> Pixels:
    if picture.mode != "RGB":
        raise ValueError(f"the picture's mode is {picture.mode!r}, not 'RGB'")
    return np.asarray(picture).reshape(picture.height, 3 * picture.width)


def _band(pixels: Pixels, *, is_last: bool) -> _Band:
    filtered = np.empty((pixels.shape[0], 1 + pixels.shape[1]), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 0] = 0  # no filter: the row above is another band's
    filtered[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=filtered[1:, 1:])
    compressor = isal_zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS)
    # What is flushed ends with a whole byte, so that the next band's can follow.
    end = zlib.Z_FINISH if is_last else zlib.Z_FULL_FLUSH
    content = compressor.compress(filtered) + compressor.flush(end)
    return _Band(_chunk(b"IDAT", content), isal_zlib.adler32(filtered), filtered.size)


def _joined(first: int, second: int, length: int) -> int:
    """The Adler-32 of two stretches, of theirs and the second one's length in bytes.

    Its low half is 1 and the sum of all bytes, its high half the sum of what the low half was after
    each byte: that of the second stretch began as much higher as the first one's bytes are.
    """
    more = (first & 0xFFFF) - 1
    low = ((second & 0xFFFF) + more) % _ADLER
    high = ((first >> 16) + (second >> 16) + length * more) % _ADLER
    return high << 16 | low


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(name))
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
