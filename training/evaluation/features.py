"""A network's vectors of many pictures, in chunks and in order, with a progress bar."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone.artifact import Artifact
from backbone.descriptors import check_descriptors, describe
from training.decoding import decode
from training.distributed import World, gather_rows
from training.precision import autocast, autocast_dtype
from training.sources import DataError, Pictures
from training.workers import worker_settings

View = Callable[[Image.Image], Tensor]
"""Picture -> normalised tensor [C, H, W], run in the workers."""

Embed = Callable[[Tensor], Mapping[str, Tensor]]
"""Batch of views on the device -> vectors [B, D] by descriptor, float32 on the same device."""

Batch = tuple[Tensor, Mapping[str, Tensor]]
"""Places [B] of pictures, and their vectors [B, D] by descriptor."""


def reading_workers(device: torch.device) -> int:
    """How many processes read pictures for `device` where nobody says it: none for a CPU.

    There a worker would take a core from the forward; see `stream`.
    """
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, (cores or 1) // max(1, torch.cuda.device_count())))


def content_and_name(pictures: Pictures, place: int) -> tuple[bytes, str]:
    """The encoded bytes of the picture that stands at `place`, and its name: what `decode` takes.

    Raises:
        DataError: they cannot be read.
    """
    name = pictures.names[place]
    try:
        return pictures.read(place), name
    except OSError as error:
        raise DataError(f"picture {name!r} cannot be read: {error}") from error


def share(count: int, here: World) -> range:
    """This process's part of `count` pictures: neighbours, so that archives are read in order."""
    return range(count * here.rank // here.size, count * (here.rank + 1) // here.size)


@torch.inference_mode()
def stream(
    pictures: Pictures,
    view: View,
    embed: Embed,
    *,
    here: World,
    batch_size: int = 256,
    workers: int = 0,
    title: str = "features",
) -> Iterator[Batch]:
    """Embeds this process's share, batch by batch: places [B], and vectors [B, D] on its device.

    Nothing is kept: what is asked of a million pictures can be asked of each batch. A process whose
    share is empty gives one batch of no rows, from which it learns what the others have.

    Args:
        batch_size: 1 where views differ in size.
        workers: processes that read pictures while others are embedded. With 0, this process reads
            each batch before it embeds it, by as many threads as its forward has, so that neither
            takes a core from the other: the best on a CPU (docs/benchmarks.md).

    Raises:
        DataError: a picture that cannot be read; it is named.
    """
    places = share(len(pictures.names), here)
    reader = _Reader(pictures, view, places or range(1))
    read: Iterable[Sequence[Tensor]]
    if workers:
        read = DataLoader(
            reader,
            batch_size=batch_size,
            pin_memory=here.device.type == "cuda",
            **worker_settings(workers),
        )
    else:
        read = _read_here(reader, batch_size)
    with tqdm(
        total=len(places), unit="picture", desc=title, dynamic_ncols=True, disable=not here.is_main
    ) as bar:
        for at, batch in read:
            found = embed(batch.to(here.device, non_blocking=True))
            kept = len(at) if places else 0
            yield at[:kept], {name: vectors[:kept] for name, vectors in found.items()}
            bar.update(kept)


def collect(batches: Iterable[Batch], here: World) -> dict[str, Tensor]:
    """All processes' vectors in one matrix for each descriptor, [N, D] float32 on the CPU.

    Each process gives its share, in order, at least one batch, and gets all of them.
    """
    parts: dict[str, list[Tensor]] = {}
    for _, found in batches:
        for name, vectors in found.items():
            parts.setdefault(name, []).append(vectors.cpu())
    return {name: gather_rows(torch.cat(each), here) for name, each in parts.items()}


def extract(
    pictures: Pictures,
    view: View,
    embed: Embed,
    *,
    here: World,
    batch_size: int = 256,
    workers: int = 0,
    title: str = "features",
) -> dict[str, Tensor]:
    """The vectors of every picture in one matrix for each descriptor, [N, D] float32 on the CPU.

    Every process computes its share and gets all of them. For sets whose vectors fit the memory;
    see `stream` for others, and for the arguments.

    Raises:
        DataError: a picture that cannot be read; it is named.
    """
    return collect(
        stream(pictures, view, embed, here=here, batch_size=batch_size, workers=workers,
               title=title),
        here,
    )  # fmt: skip


def embedder(
    artifact: Artifact,
    device: torch.device,
    *,
    precision: str = "fp32",
    descriptors: Sequence[str] = ("cls",),
) -> Embed:
    """Batches of views on `device` -> their descriptors, by one forward of the artifact's network.

    Args:
        precision: "fp32", "fp16", "bf16" or "auto", as recipes name them.
        descriptors: see `backbone.descriptors.describe`.

    Raises:
        ValueError: a descriptor that is unknown, or that the network does not have.
    """
    network = artifact.network().to(device)
    check_descriptors(network, descriptors)
    dtype = autocast_dtype(precision, device)

    def embed(batch: Tensor) -> dict[str, Tensor]:
        with autocast(device, dtype):
            found = describe(network, batch, descriptors)
        return {name: vectors.float() for name, vectors in found.items()}

    return embed


class _Reader(Dataset[tuple[int, Tensor]]):
    """Reads and decodes this process's share: the place of the i-th picture, and its view."""

    def __init__(self, pictures: Pictures, view: View, places: range) -> None:
        self._pictures, self._view, self._places = pictures, view, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        return self.place(i), self.view(self.read(i))

    def place(self, i: int) -> int:
        """Where the i-th of the share stands among all pictures."""
        return self._places[i]

    def read(self, i: int) -> tuple[bytes, str]:
        """The encoded bytes, and the name. For one thread at a time: archives hold a place."""
        return content_and_name(self._pictures, self.place(i))

    def view(self, content: tuple[bytes, str]) -> Tensor:
        """What `read` gave -> its view. For any thread."""
        return self._view(decode(*content))


def _read_here(reader: _Reader, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each batch when it is asked for: places and views, decoded by this process's threads."""
    reading = Lock()

    def make(i: int) -> Tensor:
        with reading:
            content = reader.read(i)
        return reader.view(content)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(reader), batch_size):
            batch = range(start, min(start + batch_size, len(reader)))
            with warnings.catch_warnings():
                # `decode` silences the decoder's in a way that threads undo for one another.
                warnings.filterwarnings("ignore", module="PIL")
                made = torch.stack(list(pool.map(make, batch)))
            yield torch.tensor([reader.place(i) for i in batch]), made
