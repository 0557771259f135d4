"""Multi-crop and the paper's colour augmentations (arXiv 2104.14294, section 3.2 and appendix C).

Every random choice comes from the generator that the caller passes, so that a picture's crops
depend on the run's seed, the epoch and the picture alone: not on workers, ranks or restarts.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from training.config import Crops

Bytes = npt.NDArray[np.uint8]

_RATIOS = (3 / 4, 4 / 3)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1
_P_FLIP, _P_JITTER, _P_GREY, _P_SOLARIZE = 0.5, 0.8, 0.2, 0.2
_P_BLUR_FIRST, _P_BLUR_SECOND, _P_BLUR_LOCAL = 1.0, 0.1, 0.5
_BLUR_RADIUS = (0.1, 2.0)


def multi_crop(picture: Image.Image, crops: Crops, rng: random.Random) -> tuple[Bytes, Bytes]:
    """One RGB picture -> its global crops [2, 3, G, G] and local ones [N, 3, L, L], 8-bit.

    The two global crops differ: the first is always blurred, the second seldom, but sometimes
    solarised.
    """

    def crop(size: int, scale: tuple[float, float], p_blur: float, p_solarize: float) -> Bytes:
        box = random_box(picture.width, picture.height, scale, rng)
        view = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
        view = _augment(view, rng, p_blur=p_blur, p_solarize=p_solarize)
        return np.asarray(view).transpose(2, 0, 1)

    first = crop(crops.global_size, crops.global_scale, _P_BLUR_FIRST, 0.0)
    second = crop(crops.global_size, crops.global_scale, _P_BLUR_SECOND, _P_SOLARIZE)
    locals_ = [
        crop(crops.local_size, crops.local_scale, _P_BLUR_LOCAL, 0.0)
        for _ in range(crops.local_count)
    ]
    empty = np.empty((0, 3, crops.local_size, crops.local_size), dtype=np.uint8)
    return np.stack((first, second)), np.stack(locals_) if locals_ else empty


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


def _augment(
    view: Image.Image, rng: random.Random, *, p_blur: float, p_solarize: float
) -> Image.Image:
    if rng.random() < _P_FLIP:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < _P_JITTER:
        view = _color_jitter(view, rng)
    if rng.random() < _P_GREY:
        view = view.convert("L").convert("RGB")
    if rng.random() < p_blur:
        view = view.filter(ImageFilter.GaussianBlur(radius=rng.uniform(*_BLUR_RADIUS)))
    if p_solarize and rng.random() < p_solarize:
        view = ImageOps.solarize(view, threshold=128)
    return view


def _color_jitter(view: Image.Image, rng: random.Random) -> Image.Image:
    operations: list[tuple[Callable[..., Image.Image], float]] = [
        (tv.adjust_brightness, rng.uniform(1 - _BRIGHTNESS, 1 + _BRIGHTNESS)),
        (tv.adjust_contrast, rng.uniform(1 - _CONTRAST, 1 + _CONTRAST)),
        (tv.adjust_saturation, rng.uniform(1 - _SATURATION, 1 + _SATURATION)),
        (tv.adjust_hue, rng.uniform(-_HUE, _HUE)),
    ]
    rng.shuffle(operations)
    for operation, strength in operations:
        view = operation(view, strength)
    return view
