"""Pictures of what attention keeps beside what it should: one row for each picture."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.evaluation.masks import Pair

_WIDTH, _HEIGHT, _GAP = 240, 180, 4  # pixels; a picture is fitted into a tile
_BOTH, _MISSED, _WRONG = (64, 190, 96), (60, 110, 220), (220, 64, 52)


def draw_example(pair: Pair, kept: npt.NDArray[np.bool_]) -> list[Image.Image]:
    """Picture, its mask, the patches kept [h, w], and all in one.

    In the last, green is object that was kept, blue object that was not, and red is what was kept
    beside it. Void, which does not count, is grey in the mask.
    """
    size = pair.picture.size
    scale = min(_WIDTH / size[0], _HEIGHT / size[1])
    shown = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    picture = pair.picture.resize(shown, Image.Resampling.BICUBIC)
    inside, counted, found = (
        np.asarray(Image.fromarray(mask).resize(shown, Image.Resampling.NEAREST))
        for mask in (pair.mask.inside, pair.mask.counted, kept)
    )
    truth = np.where(counted, np.where(inside, 255, 0), 128).astype(np.uint8)
    colours = np.asarray(picture.convert("L").convert("RGB")).copy()
    for where, colour in (
        (inside & found, _BOTH),
        (inside & ~found, _MISSED),
        (~inside & counted & found, _WRONG),
    ):
        colours[where] = colours[where] // 2 + np.array(colour, dtype=np.uint8) // 2
    return [
        picture,
        Image.fromarray(truth).convert("RGB"),
        Image.fromarray(found).convert("RGB"),
        Image.fromarray(colours),
    ]


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of tiles as one picture."""
    columns = max(map(len, rows))
    whole = Image.new(
        "RGB",
        (columns * (_WIDTH + _GAP) - _GAP, len(rows) * (_HEIGHT + _GAP) - _GAP),
        "white",
    )
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            left = x * (_WIDTH + _GAP) + (_WIDTH - tile.width) // 2
            whole.paste(tile, (left, y * (_HEIGHT + _GAP) + (_HEIGHT - tile.height) // 2))
    return whole
