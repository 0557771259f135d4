"""A benchmark of copy detection made from any folder of pictures, fixed by a seed."""

import hashlib
import io
import random
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from training.decoding import decode
from training.evaluation.copy_search import STRANGER, CopyBenchmark
from training.evaluation.transformations import TRANSFORMATIONS
from training.sources import DataError, JoinedPictures, Pictures, SomePictures

COUNT = 100
LEAST = 4
"""Strangers that there must be: a collage needs three others."""

_LONGEST = 640  # pixels: a copy of a giant is no other than one of a picture that fits a screen
_TILE, _COLUMNS, _LINE = 200, 6, 18


class Roles(NamedTuple):
    """What each picture of the folder is for; places, in an order that the seed decides.

    Attributes:
        originals: in the database, and copied.
        strangers: copied too, but not in the database: every match of such a copy is a false one.
            They are also what collages and overlays borrow, so that no borrowed part is a match.
        distractors: in the database, not copied.
    """

    originals: list[int]
    strangers: list[int]
    distractors: list[int]


def draw_roles(names: Sequence[str], *, seed: int, count: int | None = None) -> Roles:
    """Draws `count` originals and as many strangers; the others are distractors.

    A picture's place in the draw depends on the seed and its own name alone.

    Args:
        count: None takes `COUNT`, or a third of the pictures where that is less.

    Raises:
        DataError: too few pictures.
    """
    if count is None:
        count = max(LEAST, min(COUNT, len(names) // 3))
    if count < LEAST or len(names) < 2 * count:
        raise DataError(
            f"{len(names)} pictures with {count} copied originals: expected at least {LEAST} "
            "originals and twice as many pictures, as half of the copies have no original"
        )
    drawn = sorted(
        range(len(names)),
        key=lambda i: (hashlib.sha256(f"{seed}/{names[i]}".encode()).digest(), names[i]),
    )
    return Roles(drawn[:count], drawn[count : 2 * count], sorted(drawn[2 * count :]))


class SyntheticCopies:
    """One transformation of the originals, and then of the strangers.

    A copy depends on the seed, the picture's name, the transformation, and what it may borrow:
    not on other copies, their order, or the process that makes it.
    """

    def __init__(self, pictures: Pictures, roles: Roles, transformation: str, *, seed: int) -> None:
        self._copied = SomePictures(pictures, roles.originals + roles.strangers)
        self._originals = len(roles.originals)
        self._transformation, self._seed = transformation, seed
        self.names: Sequence[str] = [f"{transformation}/{name}" for name in self._copied.names]

    def read(self, i: int) -> bytes:
        """The copy of picture `i`, without further loss."""
        file = io.BytesIO()
        self.picture(i).save(file, "PPM")
        return file.getvalue()

    def picture(self, i: int) -> Image.Image:
        """The copy of picture `i`.

        Raises:
            DataError: a picture that cannot be read.
        """
        name = self._copied.names[i]
        rng = random.Random(f"{self._seed}/{self._transformation}/{name}")
        lenders = [j for j in range(self._originals, len(self._copied.names)) if j != i]
        lent = iter(rng.sample(lenders, LEAST - 1))
        return TRANSFORMATIONS[self._transformation](
            _read(self._copied, i), rng, lambda: _read(self._copied, next(lent))
        )


def synthetic_benchmark(
    pictures: Pictures,
    *,
    seed: int,
    count: int | None = None,
    transformations: Sequence[str] = tuple(TRANSFORMATIONS),
) -> CopyBenchmark:
    """Transformed originals and strangers, to be found among originals and distractors.

    Args:
        count: see `draw_roles`.
        transformations: names in `TRANSFORMATIONS`, each a block.

    Raises:
        DataError: too few pictures.
    """
    roles = draw_roles(pictures.names, seed=seed, count=count)
    half = len(roles.originals)
    whole = half + len(roles.strangers)
    groups = [*range(half), *[STRANGER] * half]
    return CopyBenchmark(
        queries=JoinedPictures(
            [SyntheticCopies(pictures, roles, name, seed=seed) for name in transformations]
        ),
        query_groups=torch.tensor(groups * len(transformations)),
        blocks={name: range(i * whole, (i + 1) * whole) for i, name in enumerate(transformations)},
        database=SomePictures(pictures, roles.originals + roles.distractors),
        database_groups=torch.tensor([*range(half), *[STRANGER] * len(roles.distractors)]),
    )


def contact_sheet(pictures: Pictures, *, seed: int, count: int | None = None) -> Image.Image:
    """One original and each of its copies, with their names.

    Raises:
        DataError: too few pictures, or one that cannot be read.
    """
    roles = draw_roles(pictures.names, seed=seed, count=count)
    copies = (
        (name, SyntheticCopies(pictures, roles, name, seed=seed).picture(0))
        for name in TRANSFORMATIONS
    )
    tiles = list(chain([("original", _read(pictures, roles.originals[0]))], copies))
    rows = -(-len(tiles) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * (_TILE + _LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (name, picture) in enumerate(tiles):
        left, top = i % _COLUMNS * _TILE, i // _COLUMNS * (_TILE + _LINE)
        sheet.paste(ImageOps.pad(picture, (_TILE - 4, _TILE - 4), color="white"), (left + 2, top))
        draw.text((left + 4, top + _TILE - 2), name, fill="black", font=font)
    return sheet


def _read(pictures: Pictures, i: int) -> Image.Image:
    picture = decode(pictures.read(i), pictures.names[i])
    picture.thumbnail((_LONGEST, _LONGEST))
    return picture
