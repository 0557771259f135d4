"""Untrusted bytes -> picture, within limits.

The header is checked before anything is decoded, and formats are an allow-list; what an opened
picture becomes is told in `backbone.pictures`.
"""

import base64
import binascii
import ctypes
import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from backbone.pictures import FORMATS, Mode, over_white, to_mode
from backbone.preprocess import Extent
from service.errors import ImageError

Size = tuple[int, int]
THUMBNAIL_SIDE = 192  # pixels, of the longer side
_REDUCTIONS = (8, 4, 2)  # what libjpeg decodes to at less than the whole price


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest picture, encoded (bytes) and decoded (width x height)."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A picture, upright, and where it ends where it is at a reduced scale."""

    picture: Image.Image
    extent: Extent | None


def decode(content: bytes, limits: Limits, *, param: str, mode: Mode = "RGB") -> Image.Image:
    """Encoded bytes -> the whole picture, of `mode`, upright; see `decode_reduced`."""
    whole = decode_reduced(content, limits, param=param, mode=mode, needed=lambda size: [size])
    return whole.picture


def decode_reduced(
    content: bytes,
    limits: Limits,
    *,
    param: str,
    mode: Mode,
    needed: Callable[[Size], Sequence[Size]],
) -> Decoded:
    """Encoded bytes -> picture of `mode`, upright, at 1, 1/2, 1/4 or 1/8 of its sides.

    libjpeg decodes a JPEG at a reduced scale for a fraction of the price; pictures of other formats
    are averaged after decoding, which makes all that follows cheaper.

    Args:
        param: where the picture stood in the request, for the message.
        needed: (width, height) -> the least (width, height) that each use of the picture wants of
            it; for a picture on its side, the same on its side.

    Raises:
        ImageError: 413 too large, 415 no picture of an allowed format, 400 broken.
    """
    check_bytes(content, limits, param=param)
    if not content:
        raise ImageError(f"{param} is empty", code="invalid_image", param=param)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            _check_pixels(opened, limits, param)
            return _decode(opened, mode, _reduction(opened, needed(opened.size)))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{param} is not a picture of an allowed format ({', '.join(FORMATS)})",
            code="unsupported_image",
            param=param,
            status=415,
        ) from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # beyond, Pillow opens none
        raise _too_many_pixels(limits, param, f"its header tells of more than {most}") from error
    except Exception as error:
        # A decoder may raise anything on bytes that are wrong: Pillow promises no kinds of errors.
        raise ImageError(
            f"{param} cannot be read, it is damaged or cut short: {error}",
            code="invalid_image",
            param=param,
        ) from error


def is_url(text: str) -> bool:
    """Whether text names a picture elsewhere; `service.fetching` may get it."""
    return text[:8].lower().startswith(("http://", "https://"))


def from_text(text: str, limits: Limits, *, param: str) -> bytes:
    """A data URI or plain base64 -> bytes.

    Raises:
        ImageError: text that is neither, or too long.
    """
    if is_url(text):
        raise ImageError(
            f"{param} is a URL, and this service fetches none: send the picture itself, or have "
            "its operator set DINOSCOPE_FETCH_URLS=true",
            code="url_fetching_off",
            param=param,
        )
    if text[:5].lower() == "data:":
        head, separator, body = text.partition(",")
        if not separator or not head.lower().endswith(";base64"):
            raise ImageError(
                f"{param} is a data URI, but not one like data:image/jpeg;base64,...",
                code="invalid_data_uri",
                param=param,
            )
        text = body
    if len(text) * 3 // 4 > limits.max_bytes + 3:
        raise _too_many_bytes(limits, param=param)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"{param} is neither a data URI nor base64: {error}",
            code="invalid_base64",
            param=param,
        ) from error


def check_bytes(content: bytes, limits: Limits, *, param: str) -> None:
    """Refuses an encoded picture that is too large.

    Raises:
        ImageError: 413.
    """
    if len(content) > limits.max_bytes:
        raise _too_many_bytes(limits, param=param)


def scaled_down(picture: Image.Image, side: int) -> Image.Image:
    """The picture over white, at most `side` pixels on its long side, RGB."""
    small = over_white(picture)
    return small.resize(scaled_down_size(small.size, side), Image.Resampling.BICUBIC)


def scaled_down_size(size: Size, side: int) -> Size:
    """The size of the same shape with a long side of at most `side` pixels."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def thumbnail(picture: Image.Image, *, side: int = THUMBNAIL_SIDE) -> bytes:
    """A small JPEG of the picture, at most `side` pixels on its long side."""
    small = scaled_down(picture, side)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def quiet_decoders() -> None:
    """Keeps notes on odd pictures out of the log, where a user's mistake is no error.

    Pillow's, and those that libtiff writes to the standard error stream, between lines of JSON. For
    the whole process: Python cannot change the filters for one thread alone.
    """
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for library in _loaded("libtiff"):
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def _loaded(name: str) -> list[ctypes.CDLL]:
    """The shared libraries of that name, with or without a version, in this process; on Linux."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    found = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    paths = sorted(path for path in map(Path, found) if re.match(rf"{name}[-.].*", path.name))
    return [ctypes.CDLL(str(path)) for path in paths if path.is_file()]


def _decode(opened: Image.Image, mode: Mode, reduction: int) -> Decoded:
    whole = opened.size
    if reduction > 1 and isinstance(opened, JpegImageFile):
        opened.draft(None, (whole[0] // reduction, whole[1] // reduction))
    drafted = opened.size != whole
    picture = to_mode(opened, mode)
    if reduction == 1:
        return Decoded(picture=picture, extent=None)
    if drafted:
        aside = (picture.width > picture.height) != (whole[0] > whole[1])
        width, height = reversed(whole) if aside else whole
    else:
        width, height = picture.size
        picture = picture.reduce(reduction)
    return Decoded(picture=picture, extent=(width / reduction, height / reduction))


def _reduction(opened: Image.Image, needed: Sequence[Size]) -> int:
    """The largest of 8, 4, 2 and 1 by which a picture may be reduced.

    One that is not upright must have sides that it divides: what the last pixels stand for would
    come to lie elsewhere.
    """
    width, height = opened.size
    spare = min(min(width / least[0], height / least[1]) for least in needed)
    possible = [reduction for reduction in _REDUCTIONS if spare >= reduction]
    if possible and opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        possible = [r for r in possible if width % r == 0 and height % r == 0]
    return max(possible, default=1)


def _check_pixels(picture: Image.Image, limits: Limits, param: str) -> None:
    width, height = picture.size
    if width * height > limits.max_pixels:
        raise _too_many_pixels(limits, param, f"it has {width} x {height}")


def _too_many_bytes(limits: Limits, *, param: str) -> ImageError:
    return ImageError(
        f"{param} is larger than {limits.max_bytes} bytes",
        code="image_too_large",
        param=param,
        status=413,
    )


def _too_many_pixels(limits: Limits, param: str, found: str) -> ImageError:
    return ImageError(
        f"{param} has too many pixels: {found}, allowed are {limits.max_pixels}",
        code="image_too_large",
        param=param,
        status=413,
    )
