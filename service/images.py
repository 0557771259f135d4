"""Untrusted bytes -> picture, within limits.

The header is checked before anything is decoded, and formats are an allow-list; what an opened
picture becomes is told in `backbone.pictures`.
"""

import base64
import binascii
import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from backbone.pictures import FORMATS, Mode, over_white, to_mode
from service.errors import ImageError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest picture, encoded (bytes) and decoded (width x height)."""

    max_bytes: int
    max_pixels: int


def decode(content: bytes, limits: Limits, *, param: str, mode: Mode = "RGB") -> Image.Image:
    """Encoded bytes -> picture of `mode`, upright.

    Args:
        param: where the picture stood in the request, for the message.

    Raises:
        ImageError: 413 too large, 415 no picture of an allowed format, 400 broken.
    """
    if len(content) > limits.max_bytes:
        raise _too_many_bytes(limits, param=param)
    if not content:
        raise ImageError(f"{param} is empty", code="invalid_image", param=param)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            _check_pixels(picture, limits, param)
            return to_mode(picture, mode)
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
        raise _too_many_pixels(limits, param, "its header says more than that") from error
    except Exception as error:
        # A decoder may raise anything on bytes that are wrong: Pillow promises no kinds of errors.
        raise ImageError(
            f"{param} cannot be read, it is damaged or cut short: {error}",
            code="invalid_image",
            param=param,
        ) from error


def from_text(text: str, limits: Limits, *, param: str) -> bytes:
    """A data URI or plain base64 -> bytes.

    Raises:
        ImageError: text that is neither, or too long.
    """
    if text[:8].lower().startswith(("http://", "https://")):
        raise ImageError(
            f"{param} is a URL, and this service fetches none; send the picture itself",
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


def thumbnail(picture: Image.Image, *, side: int = 192) -> bytes:
    """A small JPEG of the picture, at most `side` pixels on its long side."""
    small = over_white(picture).copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def quiet_decoders() -> None:
    """Keeps Pillow's notes on odd pictures out of the log.

    For the whole process: Python cannot change the filters for one thread alone.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


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
