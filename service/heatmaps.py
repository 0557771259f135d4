"""Attention -> picture: colour maps, masks by mass, overlays, and all heads as a grid."""

import io
import math
from dataclasses import dataclass
from typing import Literal, get_args

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from backbone.descriptors import mass_mask

Colormap = Literal["viridis", "inferno", "magma", "plasma", "cividis", "turbo", "jet", "gray"]
COLORMAPS: tuple[Colormap, ...] = get_args(Colormap)
_GAP = 4  # pixels between the heads of a grid

Maps = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How maps are drawn.

    Attributes:
        colormap: one of `COLORMAPS`.
        overlay: strength of the map over the picture, 0 (the picture alone) to 1 (the map alone).
        threshold: where given, only the patches that hold this share of the mass are coloured.
        size: the long side of each map in pixels.
    """

    colormap: Colormap
    overlay: float
    threshold: float | None
    size: int


def draw(maps: Maps, picture: Image.Image, style: Style) -> bytes:
    """Maps [A, h, w] over the picture, in its own aspect ratio; PNG, a grid where A > 1."""
    scale = style.size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    background = picture.resize((width, height), Image.Resampling.BICUBIC)
    tiles = [_tile(one, background, style) for one in maps]
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
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _tile(attention: npt.NDArray[np.float32], background: Image.Image, style: Style) -> Image.Image:
    heat = _resize(attention / max(float(attention.max()), 1e-12), *background.size)
    colours = matplotlib.colormaps[style.colormap](heat, bytes=True)[..., :3]
    if style.threshold is not None:
        mask = mass_mask(torch.from_numpy(attention.reshape(1, -1)), style.threshold)
        kept = Image.fromarray(mask.numpy().reshape(attention.shape).astype(np.uint8) * 255)
        inside = np.asarray(kept.resize(background.size, Image.Resampling.NEAREST)) > 0
        colours = np.where(inside[..., None], colours, np.uint8(0))  # what is left out goes dark
    return Image.blend(background, Image.fromarray(colours), style.overlay)


def _resize(values: npt.NDArray[np.float32], width: int, height: int) -> npt.NDArray[np.float32]:
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).clip(0.0, 1.0)
