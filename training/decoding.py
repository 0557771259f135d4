"""From encoded pictures to pixels: any count of channels, and JPEG no larger than its views need.

What is read: the formats of `backbone.pictures`, and NumPy's `.npy` files of uint8 [H, W] or
[H, W, C], the way to channels that no picture format knows.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from backbone.pictures import FORMATS, to_rgb
from training.augmentations import Bytes, Picture, View, picture_size
from training.picture_files import DataError

_NPY_MAGIC = b"\x93NUMPY"
_REDUCTIONS = (8, 4, 2)
_SPARE = 2.0
"""Pixels a side that a reduced picture keeps for each pixel of a view; see docs/benchmarks.md."""


def decode(content: bytes, name: str) -> Image.Image:
    """Encoded picture -> RGB, as `backbone.pictures.to_rgb` tells it.

    Raises:
        DataError: content that is no picture, or a broken one; names the picture.
    """
    with _reading(name):
        return _rgb(_open(content))


def decode_channels(content: bytes, name: str, channels: int) -> Bytes:
    """Encoded picture -> uint8 [channels, H, W], upright.

    1 channel is grey, 3 are RGB, 4 RGBA (opaque where the picture has no transparency). Others come
    from `.npy` files alone.

    Raises:
        DataError: content that is no picture, a broken one, or one of another count of channels.
    """
    with _reading(name):
        return to_array(_channels(_open(content), channels))


def decode_views(
    content: bytes,
    name: str,
    draw: Callable[[int, int], list[View]],
    *,
    channels: int = 3,
    shrink: bool = False,
) -> tuple[Picture, list[View]]:
    """Encoded picture -> a picture to take views from, and the views, whose boxes lie in it.

    A JPEG is decoded at a half, a quarter or an eighth of its sides where every view keeps `_SPARE`
    pixels a side for each of its own: the views are drawn for the whole size, before decoding.
    `shrink` averages pictures of other formats likewise, after decoding: it saves no time here, but
    keeps a batch of them small.

    Args:
        draw: width and height, upright -> the views.
        channels: see `decode_channels`.

    Raises:
        DataError: as `decode_channels` does.
    """
    with _reading(name):
        source = _open(content)
    if isinstance(source, JpegImageFile):
        return _decode_jpeg(source, name, draw, channels)
    with _reading(name):
        picture = _channels(source, channels)
    views = draw(*picture_size(picture))
    reduction = reduction_for(views) if shrink else 1
    if reduction == 1:
        return picture, views
    return _shrunk(picture, reduction), [_scaled(view, reduction) for view in views]


def reduction_for(views: Sequence[View]) -> int:
    """The largest of 8, 4, 2 and 1 at which every view has `_SPARE` pixels a side for each own."""

    def spare(view: View) -> float:
        left, top, right, bottom = view.box
        return min(right - left, bottom - top) / view.size

    least = min(map(spare, views))
    return next((r for r in _REDUCTIONS if least / r >= _SPARE), 1)


def count_pixels(content: bytes, name: str) -> int:
    """Height times width as the header tells them, without decoding (but for `.npy`).

    Raises:
        DataError: content that is no picture.
    """
    with _reading(name):
        source = _open(content)
        if isinstance(source, np.ndarray):
            return int(source[..., 0].size)
        return source.width * source.height


def to_array(picture: Picture) -> Bytes:
    """Pixels as uint8 [C, H, W], a copy."""
    if isinstance(picture, Image.Image):
        values = np.asarray(picture)
        return (values[None] if values.ndim == 2 else values.transpose(2, 0, 1)).copy(order="C")
    return np.stack([np.asarray(band) for band in picture])


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Names the picture in whatever goes wrong."""
    try:
        with warnings.catch_warnings():
            # Odd metadata and palettes: a line for each picture and epoch would bury the log.
            warnings.filterwarnings("ignore", module="PIL")
            yield
    except Exception as error:
        # A decoder may raise anything on bytes that are wrong: Pillow promises no kinds of errors.
        what = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"picture {name!r} cannot be read: {what}") from error


def _decode_jpeg(
    source: JpegImageFile, name: str, draw: Callable[[int, int], list[View]], channels: int
) -> tuple[Picture, list[View]]:
    with _reading(name):
        width, height = _upright_size(source)
    views = draw(width, height)
    reduction = reduction_for(views)
    with _reading(name):
        whole = source.size
        if reduction > 1:
            source.draft(None, (whole[0] // reduction, whole[1] // reduction))
        drafted = source.size != whole  # as it is afterwards, it may lie on its side
        picture = _channels(source, channels)
    if not drafted:
        return picture, views
    # A reduced pixel stands for reduction x reduction whole ones, the last one perhaps for fewer.
    return picture, [_scaled(view, reduction) for view in views]


def _open(content: bytes) -> Image.Image | Bytes:
    """A picture not decoded yet, or the values [H, W, C] of a `.npy` file."""
    if not content.startswith(_NPY_MAGIC):
        return Image.open(io.BytesIO(content), formats=FORMATS)
    values: Bytes = np.load(io.BytesIO(content), allow_pickle=False)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or values.size == 0:
        raise ValueError(
            f"holds {values.dtype} {list(values.shape)}; a .npy file must hold uint8 [H, W] or "
            "[H, W, C]"
        )
    return values if values.ndim == 3 else values[..., None]


def _rgb(source: Image.Image | Bytes) -> Image.Image:
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if source.shape[2] != 3:
        raise ValueError(f"has {source.shape[2]} channels where 3 are expected, data.channels")
    return Image.fromarray(source)


def _channels(source: Image.Image | Bytes, channels: int) -> Picture:
    """An opened picture as one of `channels` channels, upright.

    Raises:
        ValueError: it has another count.
    """
    if channels == 3:
        return _rgb(source)
    if isinstance(source, np.ndarray):
        if source.shape[2] != channels:
            raise ValueError(f"has {source.shape[2]} channels where data.channels = {channels}")
        bands = [Image.fromarray(np.ascontiguousarray(source[..., c])) for c in range(channels)]
        return bands[0] if channels == 1 else bands
    if channels == 1:
        return to_rgb(source).convert("L")
    if channels == 4:
        if source.has_transparency_data:
            return ImageOps.exif_transpose(source).convert("RGBA").split()
        return to_rgb(source).convert("RGBA").split()
    raise ValueError(
        f"a {source.format} picture has 1, 3 or 4 channels where data.channels = {channels}; other "
        "counts come from .npy files"
    )


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF orientation, of which 5 to 8 stand on their side."""
    width, height = picture.size
    aside = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if aside else (width, height)


def _shrunk(picture: Picture, reduction: int) -> Picture:
    if isinstance(picture, Image.Image):
        return picture.reduce(reduction)
    return [band.reduce(reduction) for band in picture]


def _scaled(view: View, reduction: int) -> View:
    left, top, right, bottom = (edge / reduction for edge in view.box)
    return replace(view, box=(left, top, right, bottom))
