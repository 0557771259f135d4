"""The features that a linear classifier learns from: of random crops, or kept in files."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from backbone.preprocess import Preprocess
from training.augmentations import random_box
from training.config import ConfigError
from training.decoding import decode
from training.distributed import World, all_reduce_sum, barrier, gather_rows
from training.evaluation.features import Embed, content_and_name, share, stream
from training.sources import Pictures
from training.workers import worker_settings

SCALE = (0.08, 1.0)
"""Of the random crop's area; torchvision's default, which the original takes."""

Rows = npt.NDArray[np.float32]
Batch = tuple[Tensor, Tensor]
"""This process's part of a batch: places [B] on the CPU and features [B, D] on the device."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which of `count` pictures each step and process takes.

    An epoch is a permutation that depends on the seed and the epoch alone. A step takes a slice of
    `batch`, and of it each process its part: two processes with half the batch see what one sees.
    The last step of an epoch takes what is left, as in the original; a process's part may be empty.
    """

    count: int
    batch: int
    seed: int
    here: World

    @property
    def steps_per_epoch(self) -> int:
        """The last of them may be smaller."""
        return -(-self.count // self.batch)

    def batch_of(self, step: int) -> int:
        """Pictures in a step of an epoch, over all processes."""
        return min(self.batch, self.count - step * self.batch)

    def batches(self, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """This process's parts of the epochs from `start` to `stop`, as lists of (epoch, place)."""
        for epoch in range(start, stop):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count).tolist()
            for step in range(self.steps_per_epoch):
                whole = order[step * self.batch : (step + 1) * self.batch]
                yield [(epoch, whole[i]) for i in share(len(whole), self.here)]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The network that makes features, and how pictures come to it.

    Attributes:
        preprocess: its own.
        embed: gives the `descriptor`, vectors of `length`.
        batch_size: pictures in a forward, on each process.
        workers: processes that read pictures, of each process.
    """

    preprocess: Preprocess
    embed: Embed
    descriptor: str
    length: int
    batch_size: int
    workers: int


def random_crop(picture: Image.Image, preprocess: Preprocess, rng: random.Random) -> Tensor:
    """The training view [C, crop, crop]: a random box of 8 to 100% of the area, flipped or not.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, of which the original takes the
    defaults: bilinear (its validation view is bicubic), ratios 3:4 to 4:3, one flip of two.
    """
    box = random_box(*picture.size, SCALE, rng)
    side = (preprocess.crop, preprocess.crop)
    # Cropped first, or the filter would reach over the box's edges.
    crop = picture.crop(box).resize(side, Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return preprocess.to_tensor(crop)


def of_random_crops(
    pictures: Pictures, frozen: Frozen, order: Order, *, start: int, stop: int
) -> Iterator[Batch]:
    """Embeds a new random crop of every picture in every epoch from `start` to `stop`.

    A picture's crop depends on the seed, the epoch and its place: not on workers or restarts.

    Raises:
        DataError: a picture that cannot be read; it is named.
    """
    device = order.here.device
    loader = DataLoader(
        _Crops(pictures, frozen.preprocess, order.seed),
        batch_sampler=_Batches(order, start, stop),
        collate_fn=_side_by_side,
        pin_memory=device.type == "cuda",
        **worker_settings(frozen.workers),
    )
    for places, crops in loader:
        if len(places):
            with torch.inference_mode():
                found = frozen.embed(crops.to(device, non_blocking=True))[frozen.descriptor]
        else:
            found = torch.empty(0, frozen.length, device=device)
        yield places, found


def of_rows(rows: Rows, order: Order, *, start: int, stop: int) -> Iterator[Batch]:
    """Takes the features of every picture in every epoch from a file that `store` wrote."""
    for batch in order.batches(start, stop):
        places = torch.tensor([place for _, place in batch], dtype=torch.int64)
        yield places, torch.from_numpy(rows[places.numpy()]).to(order.here.device)


def store(path: Path, pictures: Pictures, frozen: Frozen, here: World) -> Rows:
    """Embeds every picture's centre crop into a file, and maps it: [N, D], read only.

    Each process writes its share, and all see the whole; what is not in use leaves the memory.

    Raises:
        ConfigError: the file cannot be written.
        DataError: a picture that cannot be read; it is named.
    """
    count, row_bytes = len(pictures.names), 4 * frozen.length
    if here.is_main:
        with _keeping(path), path.open("wb") as empty:
            empty.truncate(count * row_bytes)
    barrier()
    with _keeping(path):
        file = path.open("r+b")  # written, not mapped: a full disk is an error then, not a signal
    with file:
        for places, found in stream(
            pictures,
            frozen.preprocess.centre_crop,
            frozen.embed,
            here=here,
            batch_size=frozen.batch_size,
            workers=frozen.workers,
            title=path.stem,
        ):
            if not len(places):
                continue  # fewer pictures than processes
            with _keeping(path):
                file.seek(int(places[0]) * row_bytes)  # the places of a batch are neighbours
                file.write(found[frozen.descriptor].cpu().numpy().tobytes())
        with _keeping(path):
            file.flush()
            os.fsync(file.fileno())
    barrier()
    return np.memmap(path, dtype=np.float32, mode="r", shape=(count, frozen.length))


@contextmanager
def features_folder(out: Path | None, here: World) -> Iterator[Path]:
    """A folder for files of features that every process sees; removed at the end.

    It lies in `out`, or in the system's temporary folder (TMPDIR) where there is none.

    Raises:
        ConfigError: it cannot be made, or not every process sees it.
    """
    path = Path()
    if here.is_main:
        try:
            if out is None:
                path = Path(tempfile.mkdtemp(prefix="dinoscope-features-"))
            else:
                path = out.resolve() / "features"
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"no folder for features at {error.filename!r}: {error.strerror}"
            ) from error
    try:
        yield _everywhere(path, here)
    finally:
        if here.is_main:
            shutil.rmtree(path)


@contextmanager
def _keeping(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"features cannot be kept in {str(path)!r}: {error.strerror}") from error


def _everywhere(path: Path, here: World) -> Path:
    """The main process's path, on every process."""
    own = os.fsencode(path) if here.is_main else b""
    text = gather_rows(torch.tensor(list(own), dtype=torch.uint8), here)
    path = Path(os.fsdecode(bytes(text.tolist())))
    if int(all_reduce_sum(torch.tensor(int(path.is_dir())))) < here.size:
        raise ConfigError(
            f"not every process sees {str(path)!r}; over several nodes, --out must name a folder "
            "on a disk that they share"
        )
    return path


class _Crops(Dataset[tuple[int, Tensor]]):
    """(epoch, place) -> the place, and that picture's crop in that epoch."""

    def __init__(self, pictures: Pictures, preprocess: Preprocess, seed: int) -> None:
        self._pictures, self._preprocess, self._seed = pictures, preprocess, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor]:
        epoch, place = key
        picture = decode(*content_and_name(self._pictures, place))
        rng = random.Random(f"{self._seed}/{epoch}/{place}")
        return place, random_crop(picture, self._preprocess, rng)


def _side_by_side(crops: list[tuple[int, Tensor]]) -> Any:
    """A loader's `collate_fn` for batches that may be empty."""
    return default_collate(crops) if crops else (torch.empty(0, dtype=torch.int64), torch.empty(0))


class _Batches(Sampler[list[tuple[int, int]]]):
    def __init__(self, order: Order, start: int, stop: int) -> None:
        self._order, self._start, self._stop = order, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._order.batches(self._start, self._stop)
