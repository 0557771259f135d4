"""Maps of patches -> picture: colour maps, masks by mass, overlays, and all heads as a grid."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from backbone.descriptors import mass_mask
from service import png
from service.errors import RequestError
from service.png import Both, Rows, in_turn, rows_of
from service.torch_threads import torch_threads

Colormap = Literal["viridis", "inferno", "magma", "plasma", "cividis", "turbo", "jet", "gray"]
COLORMAPS: tuple[Colormap, ...] = get_args(Colormap)
PictureFormat = Literal["png", "webp"]
_LEVELS = 256  # colours of a colour map
_GAP = 4  # pixels between the heads of a grid
_WEBP_SIDE = 16383  # the most pixels of a side that the format has room for
_WEBP_QUALITY = 90

Maps = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How maps are drawn.

    Attributes:
        colormap: one of `COLORMAPS`.
        overlay: strength of the map over the picture, 0 (the picture alone) to 1 (the map alone).
        threshold: where given, only the patches that hold this share of the mass are coloured.
        size: the long side of each map in pixels.
        format: of the file; WebP is lossy, of quality 90.
    """

    colormap: Colormap
    overlay: float
    threshold: float | None
    size: int
    format: PictureFormat = "png"


def draw(
    maps: Maps,
    picture: Image.Image,
    style: Style,
    *,
    labels: Sequence[str] = (),
    both: Both = in_turn,
) -> bytes:
    """Maps [A, h, w] over the picture, in its own aspect ratio; a grid where A > 1.

    Args:
        labels: for each map, what is written in its corner; none where empty.
        both: see `png.encode`.

    Raises:
        RequestError: a grid that is too large for the format.
    """
    background = _background(picture, style)
    painted = [_over(background, _heat(one, background.size, style), style) for one in maps]
    if len(maps) == 1 and not labels:
        return _encoded(background.size, painted[0], style.format, both)
    tiles = [rows(0, background.height) for rows in painted]
    for tile, label in zip(tiles, labels, strict=False):
        _write(tile, label)
    sheet = _sheet(tiles)
    return _encoded(sheet.size, rows_of(sheet), style.format, both)


def draw_components(
    components: Maps, picture: Image.Image, style: Style, *, both: Both = in_turn
) -> bytes:
    """Three maps [3, h, w] as red, green and blue, each from its least to its greatest value."""
    background = _background(picture, style)
    channels = [stretched(one) for one in components]

    def colours(top: int, bottom: int) -> Image.Image:
        found = [_resize(one, *background.size, top, bottom) for one in channels]
        return Image.fromarray((np.stack(found, axis=-1) * 255.0).round().astype(np.uint8))

    painted = _over(background, colours, style)
    return _encoded(background.size, painted, style.format, both)


def stretched(values: Maps) -> Maps:
    """Values of any range -> 0 (their least) to 1 (their greatest); all alike give 0.5."""
    least, greatest = float(values.min()), float(values.max())
    if greatest - least < 1e-12:
        return np.full_like(values, 0.5)
    return (values - np.float32(least)) / np.float32(greatest - least)


def _background(picture: Image.Image, style: Style) -> Image.Image:
    scale = style.size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _heat(attention: Maps, size: tuple[int, int], style: Style) -> Rows:
    values = attention / max(float(attention.max()), 1e-12) * np.float32(_LEVELS)
    palette = _palette(style.colormap)
    inside = None if style.threshold is None else _inside(attention, size, style.threshold)

    def rows(top: int, bottom: int) -> Image.Image:
        heat = _resize(values, *size, top, bottom, most=_LEVELS - 1)
        levels = heat.astype(np.uint8)
        coloured = Image.frombuffer("P", (size[0], bottom - top), levels, "raw", "P", 0, 1)
        coloured.putpalette(palette)  # faster than matplotlib's call for each pixel
        colours = coloured.convert("RGB")
        if inside is not None:  # what is left out goes dark
            kept = inside.crop((0, top, inside.width, bottom))
            colours = Image.composite(colours, Image.new("RGB", colours.size), kept)
        return colours

    return rows


def _inside(attention: Maps, size: tuple[int, int], threshold: float) -> Image.Image:
    """White where the patches are that hold the mass, else black."""
    mask = mass_mask(torch.tensor(attention.reshape(1, -1)), threshold)
    kept = Image.fromarray(mask.numpy().reshape(attention.shape).astype(np.uint8) * 255)
    return kept.resize(size, Image.Resampling.NEAREST)


@cache
def _palette(colormap: Colormap) -> bytes:
    table: Pixels = matplotlib.colormaps[colormap](np.arange(_LEVELS), bytes=True)
    return table[:, :3].tobytes()


def _over(background: Image.Image, colours: Rows, style: Style) -> Rows:
    below = rows_of(background)
    return lambda top, bottom: Image.blend(below(top, bottom), colours(top, bottom), style.overlay)


def _write(tile: Image.Image, label: str) -> None:
    """White on black in the top left corner, smaller in a small tile."""
    size = max(8, min(24, min(tile.size) // 8))
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(size)
    margin = size // 4
    place = (margin, margin)
    _, _, right, bottom = pen.textbbox(place, label, font=font, anchor="lt")
    pen.rectangle((0, 0, right + margin, bottom + margin), fill="black")
    pen.text(place, label, font=font, fill="white", anchor="lt")


def _sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    width, height = tiles[0].size
    columns = math.ceil(math.sqrt(len(tiles))) if width <= 2 * height else 1
    if len(tiles) <= 3 and width <= 2 * height:
        columns = len(tiles)
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP),
        "white",
    )
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet.paste(tile, (column * (width + _GAP), row * (height + _GAP)))
    return sheet


def _encoded(size: tuple[int, int], rows: Rows, kind: PictureFormat, both: Both) -> bytes:
    if kind == "png":
        return png.encode(size, rows, both=both)
    width, height = size
    if max(size) > _WEBP_SIDE:
        raise RequestError(
            f"size: all heads together are {width} x {height} pixels, and a side of a "
            f"WebP has at most {_WEBP_SIDE}; ask for a smaller size, or for a PNG",
            code="picture_too_large",
            param="size",
        )
    buffer = io.BytesIO()
    rows(0, height).save(buffer, "WEBP", quality=_WEBP_QUALITY)
    return buffer.getvalue()


def _resize(
    values: Maps,
    width: int,
    height: int,
    top: int = 0,
    bottom: int | None = None,
    most: float = 1.0,
) -> Maps:
    """Rows of `values` at that size, from 0 to `most`: bicubic, as Pillow does it for floats.

    In a tenth of its time.
    """
    rows, columns = values.shape
    with torch_threads(1):
        down, across = _bicubic(rows, height), _bicubic(columns, width)
        found = down[top:bottom] @ (torch.from_numpy(values.astype(np.float32)) @ across.T)
        return found.clamp_(0.0, most).numpy()


@lru_cache(maxsize=64)
def _bicubic(count: int, size: int) -> torch.Tensor:
    """The weights [size, count] with which Pillow's filter makes `size` pixels of `count`."""
    each = Image.fromarray(np.eye(count, dtype=np.float32))
    return torch.tensor(np.asarray(each.resize((count, size), Image.Resampling.BICUBIC)))
