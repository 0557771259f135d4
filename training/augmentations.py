"""Multi-crop and the paper's colour augmentations (arXiv 2104.14294, section 3.2 and appendix C).

Drawing is apart from doing: `draw_views` makes every random choice, from the picture's size alone;
`render` follows them with Pillow, and `training.device_augmentations` in batches on a device. The
choices come from the generator that the caller passes, so that a picture's crops depend on the
run's seed, the epoch and the picture alone: not on workers, ranks or restarts.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from training.config import Crops
from training.jitter import ADJUST

Bytes = npt.NDArray[np.uint8]
Picture = Image.Image | Sequence[Image.Image]
"""One picture of mode RGB or L, or one of mode L for each channel where there are others."""

JITTER = ("brightness", "contrast", "saturation", "hue")
SOLARIZE_THRESHOLD = 128

_RATIOS = (3 / 4, 4 / 3)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1
_P_FLIP, _P_JITTER, _P_GREY, _P_SOLARIZE = 0.5, 0.8, 0.2, 0.2
_P_BLUR_FIRST, _P_BLUR_SECOND, _P_BLUR_LOCAL = 1.0, 0.1, 0.5


@dataclass(frozen=True, kw_only=True)
class View:
    """What makes one crop of a picture; in the order in which it is done.

    Attributes:
        size: the crop's side in pixels.
        box: left, top, right, bottom in the picture, in pixels; resized to the crop, bicubic.
        flip: left to right.
        jitter: operations of `JITTER` with their strengths, in order; hue's in turns, the others
            factors. Saturation and hue are left out where there are not three channels.
        grey: without colour, likewise left out.
        blur_radius: of the Gaussian blur in pixels, or None.
        solarize: values from `SOLARIZE_THRESHOLD` are inverted.
    """

    size: int
    box: tuple[float, float, float, float]
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grey: bool
    blur_radius: float | None
    solarize: bool


def draw_views(width: int, height: int, crops: Crops, rng: random.Random) -> list[View]:
    """The views of one picture of that size in pixels: two global ones, then the local ones.

    The two global ones differ: the first is always blurred, the second seldom, but sometimes
    solarised.
    """

    def view(size: int, scale: tuple[float, float], p_blur: float, p_solarize: float) -> View:
        # The order of the draws is part of what a seed means: keep it.
        return View(
            size=size,
            box=random_box(width, height, scale, rng),
            flip=rng.random() < _P_FLIP,
            jitter=_draw_jitter(rng) if rng.random() < _P_JITTER else (),
            grey=rng.random() < _P_GREY,
            blur_radius=rng.uniform(*crops.blur) if rng.random() < p_blur else None,
            solarize=p_solarize > 0 and rng.random() < p_solarize,
        )

    return [
        view(crops.global_size, crops.global_scale, _P_BLUR_FIRST, 0.0),
        view(crops.global_size, crops.global_scale, _P_BLUR_SECOND, _P_SOLARIZE),
        *(
            view(crops.local_size, crops.local_scale, _P_BLUR_LOCAL, 0.0)
            for _ in range(crops.local_count)
        ),
    ]


def multi_crop(picture: Picture, crops: Crops, rng: random.Random) -> tuple[Bytes, Bytes]:
    """One picture -> its global crops [2, C, G, G] and local ones [N, C, L, L], 8-bit."""
    width, height = picture_size(picture)
    return render_views(picture, draw_views(width, height, crops, rng), crops)


def render_views(picture: Picture, views: Sequence[View], crops: Crops) -> tuple[Bytes, Bytes]:
    """The views that `draw_views` gave -> global crops [2, C, G, G] and local ones [N, C, L, L]."""
    first, second, *locals_ = (render(picture, view) for view in views)
    empty = np.empty((0, len(first), crops.local_size, crops.local_size), dtype=np.uint8)
    return np.stack((first, second)), np.stack(locals_) if locals_ else empty


def render(picture: Picture, view: View) -> Bytes:
    """One crop, uint8 [C, size, size], with Pillow; C = 3 for RGB, 1 for L, or one for each band.

    Bands are augmented alike, each on its own: the contrast's grey is that of the band.
    """
    if isinstance(picture, Image.Image):
        values = np.asarray(_render(picture, view))
        return values.transpose(2, 0, 1) if values.ndim == 3 else values[None]
    return np.stack([np.asarray(_render(band, view)) for band in picture])


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels."""
    return picture.size if isinstance(picture, Image.Image) else picture[0].size


def random_box(
    width: int, height: int, scale: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of a share of the area in `scale`, of ratio 3:4 to 4:3.

    As torchvision's RandomResizedCrop: ten tries, then the largest centred box of a legal ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _RATIOS[0]:
        h = round(width / _RATIOS[0])
    elif width / height > _RATIOS[1]:
        w = round(height * _RATIOS[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalise(crops: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """8-bit crops [..., C, H, W] -> float32; `mean` and `std` [C, 1, 1] on a scale of 0 to 1."""
    return crops.to(torch.float32).div_(255.0).sub_(mean).div_(std)


def _draw_jitter(rng: random.Random) -> tuple[tuple[str, float], ...]:
    operations = [
        ("brightness", rng.uniform(1 - _BRIGHTNESS, 1 + _BRIGHTNESS)),
        ("contrast", rng.uniform(1 - _CONTRAST, 1 + _CONTRAST)),
        ("saturation", rng.uniform(1 - _SATURATION, 1 + _SATURATION)),
        ("hue", rng.uniform(-_HUE, _HUE)),
    ]
    rng.shuffle(operations)
    return tuple(operations)


def _render(picture: Image.Image, view: View) -> Image.Image:
    size = (view.size, view.size)
    crop = picture.resize(size, Image.Resampling.BICUBIC, box=view.box)
    if view.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, strength in view.jitter:
        if crop.mode == "RGB" or operation in ("brightness", "contrast"):
            crop = ADJUST[operation](crop, strength)
    if view.grey and crop.mode == "RGB":
        crop = crop.convert("L").convert("RGB")
    if view.blur_radius is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=view.blur_radius))
    if view.solarize:
        crop = ImageOps.solarize(crop, threshold=SOLARIZE_THRESHOLD)
    return crop
