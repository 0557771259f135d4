"""Bicubic resizing with antialiasing: Pillow's, and a faster one that agrees with it to a level."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

Pixels: TypeAlias = npt.NDArray[np.uint8]
Resize: TypeAlias = Callable[[Image.Image, tuple[int, int], tuple[float, float]], Pixels]
"""(picture, its new width and height, the width and height that are resized to it from the upper
left) -> pixels [height, width], of several channels [height, width, C]."""


def with_pillow(picture: Image.Image, size: tuple[int, int], extent: tuple[float, float]) -> Pixels:
    """What evaluations use, as the original does."""
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC, box=(0.0, 0.0, *extent)))


def with_torch(picture: Image.Image, size: tuple[int, int], extent: tuple[float, float]) -> Pixels:
    """Pillow's to within three of 255 levels, where they differ, in a third to a sixth of its time.

    torch has the same filter for 8 bits in fixed point, with coarser weights, and takes the two
    directions in another order where they differ much (docs/benchmarks.md tells what that does to
    embeddings). It is taken where both sides shrink: else it is further off, and a picture's part
    that keeps its size would not be moved. Nor does it know transparency, which weighs colours.
    """
    width, height = size
    scales = height / extent[1], width / extent[0]
    whole = extent == picture.size
    reached = [int(side * scale) for side, scale in zip(picture.size[::-1], scales, strict=True)]
    shrinks = width < int(extent[0]) and height < int(extent[1])
    if picture.mode != "RGB" or not shrinks or not (whole or reached == [height, width]):
        return with_pillow(picture, size, extent)
    # The copy is one that may be written to, without which torch warns.
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    # A scale that is given is used as it is: that of a part, where `size` would be the whole's.
    resized = F.interpolate(
        pixels,
        size=(height, width) if whole else None,
        scale_factor=None if whole else scales,
        mode="bicubic",
        antialias=True,
    )
    made: Pixels = resized[0].permute(1, 2, 0).numpy()
    return made


def fastest() -> Resize:
    """The one that is faster on this processor: without AVX2 that is Pillow's."""
    has_kernels = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return with_torch if has_kernels else with_pillow
