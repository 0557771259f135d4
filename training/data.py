"""Pictures from folders and tar files, and the order in which a run sees them."""

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import tarfile
import tempfile
import warnings
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from backbone.pictures import FORMATS, SUFFIXES, to_rgb
from training.augmentations import multi_crop
from training.config import Crops
from training.distributed import World


class DataError(ValueError):
    """A source of pictures that cannot be used; the message names it and says what was expected."""


class Pictures(Protocol):
    """A sequence of encoded pictures.

    Attributes:
        names: of each picture, its path below the folder or inside the tar file.
    """

    names: Sequence[str]

    def read(self, i: int) -> bytes:
        """The encoded bytes of picture `i`; safe to call from any process."""


class FolderPictures:
    """Every picture below a folder, nested or flat, in the order of their paths."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: Sequence[str] = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if _is_picture(path.relative_to(folder).as_posix()) and path.is_file()
        )

    def read(self, i: int) -> bytes:
        """The bytes of file `i`."""
        return (self._folder / self.names[i]).read_bytes()


class TarPictures:
    """Every picture in a tar file, read in place by offset.

    A compressed tar has no offsets to read at: it is unpacked once, as a whole, into a temporary
    file that is removed when this object or the process ends.

    Raises:
        DataError: a file that is not a tar.
    """

    def __init__(self, path: Path) -> None:
        decompress = _decompressor(path)
        self._path = path if decompress is None else self._unpack(path, decompress)
        try:
            with tarfile.open(self._path, "r:") as tar:
                members = _members(tar)
        except tarfile.ReadError as error:
            raise DataError(
                f"{str(path)!r} is neither a folder nor a whole tar file "
                f"(plain, gzip, bzip2 or xz): {error}"
            ) from error
        self.names: Sequence[str] = [name for name, _, _ in members]
        self._places = [(offset, size) for _, offset, size in members]
        self._file: tuple[int, int] | None = None

    def read(self, i: int) -> bytes:
        """The bytes of member `i`."""
        offset, size = self._places[i]
        if self._file is None or self._file[0] != os.getpid():
            # One file for each process: a descriptor that was inherited may have been closed.
            self._file = (os.getpid(), os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
            weakref.finalize(self, _close, *self._file)
        return os.pread(self._file[1], size, offset)

    def _unpack(self, path: Path, decompress: Callable[[Path], BinaryIO]) -> Path:
        folder = tempfile.mkdtemp(prefix="dinoscope-tar-")
        weakref.finalize(self, _remove, os.getpid(), folder)
        unpacked = Path(folder) / "pictures.tar"
        try:
            with decompress(path) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            # bz2 tells damage by a bare OSError, which is a full disk's too.
            raise DataError(f"{str(path)!r} cannot be unpacked into {folder}: {error}") from error
        return unpacked


class JoinedPictures:
    """Several sources one after the other."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part.names) for part in parts))
        self.names: Sequence[str] = [name for part in parts for name in part.names]

    def read(self, i: int) -> bytes:
        """The bytes of picture `i`, counted over all parts."""
        part = bisect_right(self._ends, i)
        return self._parts[part].read(i - (self._ends[part - 1] if part else 0))


class SomePictures:
    """Those of another source that stand at `places`."""

    def __init__(self, whole: Pictures, places: Sequence[int]) -> None:
        self._whole = whole
        self._places = places
        self.names: Sequence[str] = [whole.names[i] for i in places]

    def read(self, i: int) -> bytes:
        """The bytes of the i-th chosen picture."""
        return self._whole.read(self._places[i])


def every(pictures: Pictures, count: int) -> Pictures:
    """At most `count` of the pictures, evenly spaced."""
    whole = len(pictures.names)
    if whole <= count:
        return pictures
    return SomePictures(pictures, [i * whole // count for i in range(count)])


def open_pictures(paths: Sequence[str | Path]) -> Pictures:
    """Opens folders and tar files (compressed or not) as one sequence.

    Raises:
        DataError: a path that does not exist, is neither, or holds no picture.
    """
    parts: list[Pictures] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{str(path)!r} does not exist; expected a folder or a tar file")
        part = FolderPictures(path) if path.is_dir() else TarPictures(path)
        if not part.names:
            kinds = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{str(path)!r} holds no picture ({kinds})")
        parts.append(part)
    return parts[0] if len(parts) == 1 else JoinedPictures(parts)


def class_labels(pictures: Pictures, *, where: str) -> list[str]:
    """The class of each picture: the name of the folder that it lies in.

    Raises:
        DataError: a picture that lies in no folder; `where` names the source in the message.
    """
    labels = [PurePosixPath(name).parent.name for name in pictures.names]
    if "" in labels:
        name = pictures.names[labels.index("")]
        raise DataError(f"{name!r} in {where} lies in no class folder; expected CLASS/PICTURE")
    return labels


def decode(content: bytes, name: str) -> Image.Image:
    """Encoded picture -> RGB, as `backbone.pictures.to_rgb` tells it.

    Raises:
        DataError: content that is no picture, or a broken one; names the picture.
    """
    try:
        with warnings.catch_warnings():
            # Odd metadata and palettes: a line for each picture and epoch would bury the log.
            warnings.filterwarnings("ignore", module="PIL")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                return to_rgb(picture)
    except Exception as error:
        # A decoder may raise anything on bytes that are wrong: Pillow promises no kinds of errors.
        raise DataError(f"picture {name!r} cannot be read: {error}") from error


class CropBatch(NamedTuple):
    """The crops of a batch: 8-bit, global [2, B, 3, G, G] and local [N, B, 3, L, L]."""

    global_crops: Tensor
    local_crops: Tensor


class MultiCropDataset(Dataset[tuple[Tensor, Tensor]]):
    """(epoch, index) -> the multi-crop of that picture in that epoch."""

    def __init__(self, pictures: Pictures, crops: Crops, *, seed: int) -> None:
        self._pictures = pictures
        self._crops = crops
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """8-bit tensors [2, 3, G, G] and [N, 3, L, L]."""
        epoch, i = key
        picture = decode(self._pictures.read(i), self._pictures.names[i])
        rng = random.Random(f"{self._seed}/{epoch}/{i}")
        global_crops, local_crops = multi_crop(picture, self._crops, rng)
        return torch.from_numpy(global_crops), torch.from_numpy(local_crops)


class RunSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one rank from one step of a run to its end, as lists of (epoch, index).

    An epoch is a permutation that depends on the seed and the epoch alone. The step's batch is a
    slice of it over all ranks, of which each takes its own part: two ranks with half the batch see
    what one sees with the whole. What is left over at an epoch's end is dropped.
    """

    def __init__(
        self, count: int, *, batch_size: int, world: World, seed: int, start: int, stop: int
    ) -> None:
        self._count = count
        self._batch_size = batch_size
        self._world = world
        self._seed = seed
        self._start, self._stop = start, stop
        self.steps_per_epoch = steps_per_epoch(count, batch_size, world)

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.empty(0, dtype=np.int64)
        drawn = -1
        for step in range(self._start, self._stop):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
                drawn = epoch
            first = (place * self._world.size + self._world.rank) * self._batch_size
            batch = order[first : first + self._batch_size]
            yield [(epoch, i) for i in batch.tolist()]


def steps_per_epoch(count: int, batch_size: int, world: World) -> int:
    """Whole batches over all ranks in `count` pictures.

    Raises:
        DataError: not even one.
    """
    whole = batch_size * world.size
    if count < whole:
        raise DataError(
            f"{count} pictures do not fill one batch of {whole} "
            f"(batch_size {batch_size} x {world.size} processes); lower batch_size"
        )
    return count // whole


def crop_loader(
    dataset: MultiCropDataset, sampler: RunSampler, *, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Gives a `CropBatch` a step, in the sampler's order whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=one_thread,
    )


def _collate(samples: list[tuple[Tensor, Tensor]]) -> CropBatch:
    return CropBatch(*(torch.stack(part, dim=1) for part in zip(*samples, strict=True)))


def one_thread(_: int) -> None:
    """For a loader's worker: leaves the cores to the other workers."""
    torch.set_num_threads(1)


def one_line(error: Exception) -> str:
    """What `error` says, without the traceback that a loader wraps a worker's `DataError` in."""
    return str(error).strip().rpartition(f"{DataError.__name__}: ")[2]


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(
        part.startswith(".") for part in path.parts if part not in (".", "..")
    )


def _members(tar: tarfile.TarFile) -> list[tuple[str, int, int]]:
    return [
        (member.name, member.offset_data, member.size)
        for member in tar
        if member.isfile() and _is_picture(member.name)
    ]


def _decompressor(path: Path) -> Callable[[Path], BinaryIO] | None:
    with path.open("rb") as file:
        magic = file.read(6)
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    return next((opener for start, opener in openers.items() if magic.startswith(start)), None)


def _close(pid: int, descriptor: int) -> None:
    if pid == os.getpid():
        os.close(descriptor)


def _remove(pid: int, folder: str) -> None:
    if pid == os.getpid():
        shutil.rmtree(folder)
