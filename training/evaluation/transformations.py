"""What people do to pictures before they post them again: named, each drawn from a given source.

Sizes are relative to the picture, so that a copy of a small picture is as hard to tell as one of a
large one. Fonts and shapes are Pillow's own.
"""

import io
import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Colour = tuple[int, int, int]

Borrow = Callable[[], Image.Image]
"""Gives another picture, a new one at each call, that is no original of the benchmark."""

Transformation = Callable[[Image.Image, random.Random, Borrow], Image.Image]
"""RGB picture -> RGB picture; all that is random comes from the second argument."""

_BICUBIC = Image.Resampling.BICUBIC
_WORDS = ("sale", "today", "only", "look", "wow", "best", "price", "new", "free", "news", "share")
_UNIT = 256  # a blur's radius is in pixels of a picture with this short side


def _plain(change: Callable[[Image.Image], Image.Image]) -> Transformation:
    return lambda picture, rng, borrow: change(picture)


def _crop(picture: Image.Image, rng: random.Random, borrow: Borrow, *, area: float) -> Image.Image:
    scale = math.sqrt(area)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    return picture.crop((left, top, left + width, top + height))


def _jpeg(picture: Image.Image, *, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _blur(picture: Image.Image, *, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius * min(picture.size) / _UNIT))


def _text(picture: Image.Image, rng: random.Random, borrow: Borrow) -> Image.Image:
    picture, draw = _drawable(picture)
    size = max(8, round(min(picture.size) * rng.uniform(0.1, 0.2)))
    font = ImageFont.load_default(size=size)
    for _ in range(rng.randint(1, 3)):
        words = " ".join(rng.choices(_WORDS, k=rng.randint(2, 4)))
        at = (rng.uniform(-0.05, 0.3) * picture.width, rng.uniform(0.0, 0.85) * picture.height)
        ink, edge = ("white", "black") if rng.random() < 0.5 else ("black", "white")
        draw.text(at, words, fill=ink, font=font, stroke_width=max(1, size // 12), stroke_fill=edge)
    return picture


def _face(picture: Image.Image, rng: random.Random, borrow: Borrow) -> Image.Image:
    """A smiling face of 25 to 50% of the short side."""
    picture, draw = _drawable(picture)
    side = min(picture.size) * rng.uniform(0.25, 0.5)
    left = rng.uniform(0, picture.width - side)
    top = rng.uniform(0, picture.height - side)

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return left + x0 * side, top + y0 * side, left + x1 * side, top + y1 * side

    draw.ellipse(box(0, 0, 1, 1), fill=(255, 205, 50), outline=(150, 100, 0), width=2)
    for x in (0.3, 0.6):
        draw.ellipse(box(x, 0.28, x + 0.1, 0.45), fill=(60, 40, 0))
    draw.arc(box(0.22, 0.3, 0.78, 0.8), 20, 160, fill=(60, 40, 0), width=max(2, round(side / 15)))
    return picture


def _sticker(picture: Image.Image, rng: random.Random, borrow: Borrow) -> Image.Image:
    """Another picture, of 30 to 50% of this one's sides, laid over it."""
    picture = picture.copy()
    share = rng.uniform(0.3, 0.5)
    width, height = (max(1, round(side * share)) for side in picture.size)
    at = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    picture.paste(ImageOps.fit(borrow(), (width, height), _BICUBIC), at)
    return picture


def _rotate(
    picture: Image.Image, rng: random.Random, borrow: Borrow, *, degrees: int
) -> Image.Image:
    fill = rng.choice([(0, 0, 0), (255, 255, 255)])
    angle = degrees * rng.choice((-1, 1))
    return picture.rotate(angle, _BICUBIC, expand=True, fillcolor=fill)


def _collage(picture: Image.Image, rng: random.Random, borrow: Borrow) -> Image.Image:
    """Two by two: this picture and three others."""
    cell = max(1, picture.width // 2 * 2), max(1, picture.height // 2 * 2)
    sheet = Image.new("RGB", (2 * cell[0], 2 * cell[1]), "white")
    own = rng.randrange(4)
    for i in range(4):
        shown = picture if i == own else borrow()
        sheet.paste(ImageOps.fit(shown, cell, _BICUBIC), (i % 2 * cell[0], i // 2 * cell[1]))
    return sheet


def _screenshot(picture: Image.Image, rng: random.Random, borrow: Borrow) -> Image.Image:
    """On a page with bars above and below, margins, and lines of text."""
    page, bar, ink = rng.choice(
        [((255, 255, 255), (235, 235, 240), (60, 60, 60)), ((24, 24, 28), (40, 40, 46), (220,) * 3)]
    )
    unit = max(4, min(picture.size) // 16)
    margin, line = rng.randint(0, 2) * unit, unit * 2
    lines = rng.randint(2, 5)
    width = picture.width + 2 * margin
    top = 3 * unit + margin
    sheet = Image.new("RGB", (width, top + picture.height + (lines + 1) * line + 3 * unit), page)
    sheet.paste(picture, (margin, top))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=max(8, unit))
    draw.rectangle((0, 0, width, 3 * unit - 1), fill=bar)
    draw.rectangle((0, sheet.height - 3 * unit, width, sheet.height), fill=bar)
    draw.text((unit, unit // 2), rng.choice(_WORDS), fill=ink, font=font)
    for i in range(4):
        x, y = (i + 0.5) * width / 4, sheet.height - 1.5 * unit
        draw.ellipse((x - unit / 2, y - unit / 2, x + unit / 2, y + unit / 2), outline=ink)
    for i in range(lines):
        words = " ".join(rng.choices(_WORDS, k=6))
        draw.text((unit, top + picture.height + (i + 0.5) * line), words, fill=ink, font=font)
    return sheet


def _colour(picture: Image.Image, rng: random.Random, borrow: Borrow) -> Image.Image:
    """Hue turned by 60 to 180 degrees; brightness, contrast and saturation halved or worse."""
    hue, saturation, value = picture.convert("HSV").split()
    shift = rng.choice((-1, 1)) * rng.randint(43, 127)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(rng.choice((0.5, 0.6, 1.6, 1.8)))
    return picture


def _drawable(picture: Image.Image) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = picture.copy()
    return picture, ImageDraw.Draw(picture)


TRANSFORMATIONS: Mapping[str, Transformation] = MappingProxyType(
    {
        **{f"crop-{p}": partial(_crop, area=p / 100) for p in (80, 50, 30, 10)},
        **{f"jpeg-{q}": _plain(partial(_jpeg, quality=q)) for q in (75, 30, 10, 3)},
        **{f"blur-{r}": _plain(partial(_blur, radius=r)) for r in (1, 3, 8)},
        "text": _text,
        "overlay-face": _face,
        "overlay-picture": _sticker,
        **{f"rotate-{d}": partial(_rotate, degrees=d) for d in (5, 15, 45, 90)},
        "collage": _collage,
        "screenshot": _screenshot,
        "flip-horizontal": _plain(ImageOps.mirror),
        "flip-vertical": _plain(ImageOps.flip),
        "grey": _plain(lambda picture: picture.convert("L").convert("RGB")),
        "colour": _colour,
    }
)
"""Name -> transformation. Numbers: % of the area, JPEG quality, radius, degrees."""
