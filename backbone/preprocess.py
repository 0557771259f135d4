"""Picture -> tensor, the same in training's evaluations and in the service."""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbone.pictures import Mode

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Extent = tuple[float, float]
"""Width and height, from the upper left, that hold a picture which was decoded at a reduced scale.

A reduced pixel stands for several; those of the last column and row perhaps for fewer, and so the
picture ends inside of them. Views of it are then those of the whole picture.
"""

_MOST = 1e6  # of a mean or deviation; far beyond, single precision has no numbers for pictures
LONGEST = 4.0
"""Times the short side that the long side of a whole picture may be for the model."""
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a model wants its pictures.

    Attributes:
        resize: the short side is scaled to this many pixels (bicubic, antialiased) ...
        crop: ... and a square of this many pixels is cut from the centre.
        copy_size: side in pixels of the square that a picture is squashed to for the copy
            descriptor (320 in the paper, section 4.2).
        mean, std: of each channel, on a scale of 0 to 1.

    Raises:
        ValueError: a field that cannot be.
    """

    resize: int = 256
    crop: int = 224
    copy_size: int = 320
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for field in ("resize", "crop", "copy_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} is {value!r}, not a positive whole number of pixels")
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}; "
                "both must have as many as a picture, at least one"
            )
        if not all(abs(m) <= _MOST for m in self.mean):
            raise ValueError(f"mean {self.mean} is not finite, or beyond {_MOST:g}")
        if not all(1 / _MOST <= s <= _MOST for s in self.std):
            raise ValueError(f"std {self.std} is not positive, from {1 / _MOST:g} to {_MOST:g}")

    @property
    def mode(self) -> Mode:
        """What a picture must be for `to_tensor`: "L" (grey), "RGB", or "RGBA".

        Raises:
            ValueError: files of pictures hold no such number of channels.
        """
        modes: dict[int, Mode] = {1: "L", 3: "RGB", 4: "RGBA"}
        if len(self.mean) not in modes:
            raise ValueError(
                f"pictures of {len(self.mean)} channels cannot be made from files; "
                "1 (grey), 3 (RGB) and 4 (RGBA) can"
            )
        return modes[len(self.mean)]

    @classmethod
    def in_proportion(cls, side: int, *, patch_size: int, channels: int = 3) -> Self:
        """The paper's sizes for a network trained on crops of `side`: 256 : 224 : 320 (copies).

        Mean and deviation are ImageNet's for 3 channels, and 0.5 and 0.25 for other counts.
        """
        copy_size = max(1, round(side * 320 / 224 / patch_size)) * patch_size
        rgb = channels == 3
        return cls(
            resize=round(side * 256 / 224),
            crop=side,
            copy_size=copy_size,
            mean=IMAGENET_MEAN if rgb else (0.5,) * channels,
            std=IMAGENET_STD if rgb else (0.25,) * channels,
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Reads what `dataclasses.asdict` wrote, after JSON has turned tuples into lists.

        Raises:
            ValueError: a missing, unknown or impossible field.
        """
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(value) - known):
            raise ValueError(f"unknown fields {unknown}; known are {sorted(known)}")
        if missing := sorted(known - set(value)):
            raise ValueError(f"missing fields {missing}")
        for field in ("mean", "std"):
            numbers = value[field]
            if not isinstance(numbers, list) or not all(
                isinstance(n, int | float) and not isinstance(n, bool) for n in numbers
            ):
                raise ValueError(f"{field} is {numbers!r}, not a list of numbers")
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})

    def centre_crop(self, picture: Image.Image, *, extent: Extent | None = None) -> Tensor:
        """The evaluation's view [C, crop, crop]: short side to `resize`, then the centre square."""
        if extent is None:
            picture = _without_far_ends(picture)
        size = self.centre_crop_size(*(extent or picture.size))
        if min(extent or picture.size) != self.resize:
            picture = self._resized(picture, size, extent)
        left = round((size[0] - self.crop) / 2)
        top = round((size[1] - self.crop) / 2)
        return self.to_tensor(picture.crop((left, top, left + self.crop, top + self.crop)))

    def whole(
        self,
        picture: Image.Image,
        *,
        short_side: float,
        multiple: int,
        extent: Extent | None = None,
    ) -> Tensor:
        """The picture in its own aspect ratio, [C, H, W], both sides multiples of `multiple`.

        The short side becomes the multiple nearest `short_side`, the long one the multiple nearest
        to the same scale; at most `LONGEST` times the short one: a sliver does not become a giant.
        """
        size = self.whole_size(*(extent or picture.size), short_side=short_side, multiple=multiple)
        return self.to_tensor(self._resized(picture, size, extent))

    def squash(
        self, picture: Image.Image, *, multiple: int, extent: Extent | None = None
    ) -> Tensor:
        """The copy descriptor's view: the whole picture as a square near `copy_size`, [C, S, S]."""
        side = self.squash_side(multiple=multiple)
        return self.to_tensor(self._resized(picture, (side, side), extent))

    def centre_crop_size(self, width: float, height: float) -> tuple[int, int]:
        """What `centre_crop` scales a picture of this width and height to, before it cuts."""
        # The long side is rounded down, as torchvision's Resize does it.
        return (
            self.resize if width <= height else int(self.resize * width / height),
            self.resize if height <= width else int(self.resize * height / width),
        )

    def whole_size(
        self, width: float, height: float, *, short_side: float, multiple: int
    ) -> tuple[int, int]:
        """What `whole` scales a picture of this width and height to."""
        short = max(1, round(short_side / multiple))
        long = max(short, round(short * _aspect(width, height)))
        columns, rows = (short, long) if width <= height else (long, short)
        return columns * multiple, rows * multiple

    def even_short_side(self, width: float, height: float) -> float:
        """The short side with which `whole` gives about as many pixels as `centre_crop` does."""
        return self.crop / math.sqrt(_aspect(width, height))

    def squash_side(self, *, multiple: int) -> int:
        """The side of the square that `squash` gives."""
        return max(1, round(self.copy_size / multiple)) * multiple

    def to_tensor(self, picture: Image.Image) -> Tensor:
        """8-bit picture -> normalised float32 [C, H, W]."""
        # In numpy: threads that decode would each wake a team of torch's own for it.
        pixels = np.asarray(self._channels(picture)).reshape(picture.height, picture.width, -1)
        values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
        values -= np.array(self.mean, dtype=np.float32).reshape(-1, 1, 1) * np.float32(255.0)
        values /= np.array(self.std, dtype=np.float32).reshape(-1, 1, 1) * np.float32(255.0)
        return torch.from_numpy(values)

    def _resized(
        self, picture: Image.Image, size: tuple[int, int], extent: Extent | None
    ) -> Image.Image:
        box = (0.0, 0.0, *(extent or picture.size))
        return self._channels(picture).resize(size, _BICUBIC, box=box)

    def _channels(self, picture: Image.Image) -> Image.Image:
        return picture if picture.mode == self.mode else picture.convert(self.mode)


def _aspect(width: float, height: float) -> float:
    """How many times the short side the long one is in `whole`."""
    return min(max(width, height) / min(width, height), LONGEST)


def _without_far_ends(picture: Image.Image, *, ratio: int = 64) -> Image.Image:
    """Cuts a sliver to its middle, of which the centre crop is a part, before it is enlarged.

    Enlarging a picture of 30,000 x 1 until its short side fits would take gigabytes.
    """
    width, height = picture.size
    most = ratio * min(width, height)
    if max(width, height) <= most:
        return picture
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return picture.crop((left, top, left + min(width, most), top + min(height, most)))
