"""What a batch holds of each picture, and who takes the place of one that cannot be read."""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from training import device_augmentations
from training.augmentations import draw_views, render_views
from training.config import Crops
from training.decoding import decode_views
from training.picture_files import DataError

TRIES = 16

T = TypeVar("T")
Bad = tuple[tuple[str, str], ...]
"""Name and reason of each picture that could not be read."""


class CropBatch(NamedTuple):
    """The crops of a batch: 8-bit, global [2, B, C, G, G] and local [N, B, C, L, L].

    Attributes:
        names: of the B pictures whose crops these are.
        bad: those that could not be read, whose places others have taken.
    """

    global_crops: Tensor
    local_crops: Tensor
    names: list[str]
    bad: Bad


class Sample(NamedTuple, Generic[T]):
    """What was `made` of the picture `name`, after the pictures `bad` could not be read."""

    made: T
    name: str
    bad: Bad


class Maker(Protocol[T]):
    """What the loader's workers make of pictures; `CropMaker` is one."""

    def one(self, content: bytes, name: str, rng: random.Random) -> T:
        """Of one picture's encoded bytes.

        Every choice comes from `rng`.

        Raises:
            DataError: the picture cannot be read.
        """

    def batch(self, made: Sequence[T], names: list[str], bad: Bad) -> Any:
        """Of a batch: a NamedTuple with tensors, and `names` and `bad` as in `CropBatch`."""


class CropMaker:
    """Makes crops with Pillow."""

    def __init__(self, crops: Crops, *, channels: int = 3) -> None:
        self._crops = crops
        self._channels = channels

    def one(self, content: bytes, name: str, rng: random.Random) -> tuple[Tensor, Tensor]:
        """8-bit tensors [2, C, G, G] and [N, C, L, L]; raises `DataError` as `decode_views`."""
        picture, views = decode_views(
            content,
            name,
            lambda width, height: draw_views(width, height, self._crops, rng),
            channels=self._channels,
        )
        global_crops, local_crops = render_views(picture, views, self._crops)
        return torch.from_numpy(global_crops), torch.from_numpy(local_crops)

    def batch(self, made: Sequence[tuple[Tensor, Tensor]], names: list[str], bad: Bad) -> CropBatch:
        """Crops side by side."""
        global_crops, local_crops = zip(*made, strict=True)
        return CropBatch(torch.stack(global_crops, 1), torch.stack(local_crops, 1), names, bad)


class DrawnBatch(NamedTuple):
    """A batch whose crops the device is yet to make; `names` and `bad` as in `CropBatch`."""

    pictures: device_augmentations.DrawnBatch
    names: list[str]
    bad: Bad


class DrawnMaker:
    """Decodes pictures and draws their views; the crops are made on the device."""

    def __init__(self, crops: Crops, *, channels: int = 3) -> None:
        self._crops = crops
        self._channels = channels

    def one(self, content: bytes, name: str, rng: random.Random) -> device_augmentations.Drawn:
        """The picture, no larger than its views need, and them; raises `DataError`."""
        return device_augmentations.draw_encoded(
            content, name, self._crops, rng, channels=self._channels
        )

    def batch(
        self, made: Sequence[device_augmentations.Drawn], names: list[str], bad: Bad
    ) -> DrawnBatch:
        """Pictures side by side, padded to the largest."""
        return DrawnBatch(device_augmentations.collate_drawn(made), names, bad)


def first_good(
    candidates: Iterable[tuple[str, Callable[[], bytes]]], maker: Maker[T], key: str
) -> Sample[T]:
    """A sample of the first candidate (name, way to its bytes) that can be read.

    Args:
        key: seeds the choices that the sample depends on: those of the place, whoever takes it.

    Raises:
        DataError: `TRIES` candidates in a row cannot be read.
    """
    bad: list[tuple[str, str]] = []
    for name, read in islice(candidates, TRIES):
        try:
            made = maker.one(read(), name, random.Random(key))
        except (DataError, OSError) as error:
            bad.append((name, _reason(error)))
        else:
            return Sample(made, name, tuple(bad))
    told = "; ".join(f"{name}: {reason}" for name, reason in bad[:3])
    raise DataError(
        f"{len(bad)} pictures in a row cannot be read, of which the first are {told}. "
        "Are these pictures? Leave out the bad ones, or mend what reads them"
    )


def batch_of(samples: Sequence[Sample[T]], maker: Maker[T]) -> Any:
    """The batch that `maker` makes of the samples."""
    bad = tuple(each for sample in samples for each in sample.bad)
    return maker.batch([s.made for s in samples], [s.name for s in samples], bad)


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnidentifiedImageError):  # its message gives an address in memory
        return "not a picture of a known format"
    return str(cause) or type(cause).__name__
