"""A data set that is decoded once and lives on the device whole."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.decoding import count_pixels, decode_channels
from training.sources import DataError, Pictures
from training.workers import worker_settings

_SHARE = 0.8
"""Of the free memory that pictures may take; the rest is the network's and its batches'."""


class PicturesOnDevice:
    """Pictures of any sizes as bytes on a device, in the order of their source.

    Two passes over the source: one reads the headers, so that it is known beforehand what the
    pictures need; one decodes. Those that cannot be read are left out, and listed.

    Args:
        free_bytes: memory that there is for them; where left out, what is free on a CUDA device,
            and all that the machine has on the CPU.
        progress: shows a bar of each pass.

    Attributes:
        pictures: where they come from.
        names: of the pictures that are held.
        sizes: int64 [n, 2], their heights and widths, on the CPU.
        bad: name and reason of each picture that could not be read.
        bytes: that they take on the device.

    Raises:
        DataError: they need more than 80% of the free memory, or none of them can be read.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        device: torch.device,
        channels: int = 3,
        workers: int = 4,
        free_bytes: int | None = None,
        progress: bool = True,
    ) -> None:
        self.pictures = pictures
        count = len(pictures.names)
        bad: dict[int, str] = {}
        lengths = [0] * count
        for i, found in _walk(_Headers(pictures), count, "headers", workers, progress):
            if isinstance(found, str):
                bad[i] = found
            else:
                lengths[i] = found * channels
        self.bytes = sum(lengths)
        _check_memory(self.bytes, count, device, free_bytes)

        self._flat = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        self._channels = channels
        self._starts: list[int] = []
        sizes: list[tuple[int, int]] = []
        starts = list(accumulate(lengths, initial=0))
        decoded = _Decoded(pictures, channels)
        for i, found in _walk(
            decoded, count, "decoding", workers, progress, pack=_pack, unpack=_unpack
        ):
            if isinstance(found, str):
                bad[i] = found
            elif found.numel() != lengths[i]:
                bad[i] = (
                    f"picture {pictures.names[i]!r} cannot be read: it is {list(found.shape)}, "
                    f"where its header tells {lengths[i]} bytes"
                )
            else:
                self._flat[starts[i] : starts[i + 1]].copy_(found.flatten())
                self._starts.append(starts[i])
                sizes.append((found.shape[1], found.shape[2]))
        self.bad = [(pictures.names[i], bad[i]) for i in sorted(bad)]
        if not sizes:
            raise DataError(f"none of {count} pictures can be read; the first: {self.bad[0][1]}")
        self.names = [name for i, name in enumerate(pictures.names) if i not in bad]
        self.sizes = torch.tensor(sizes)
        row = channels * sizes[0][0] * sizes[0][1]
        alike = len(set(sizes)) == 1 and all(start % row == 0 for start in self._starts)
        self._row = row if alike else None

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Some pictures, as `training.device_augmentations.augment` takes them.

        Returns:
            uint8 [B, C, H, W] on the device, padded with 0 at the right and at the bottom; and
            int64 [B, 2] on the CPU, heights and widths.
        """
        sizes = self.sizes[list(indices)]
        height, width = sizes.amax(dim=0).tolist()
        starts = [self._starts[i] for i in indices]
        if self._row is not None:
            # All of one size: one gathering instead of a copy for each picture.
            rows = torch.tensor([start // self._row for start in starts])
            if self._flat.is_cuda:
                rows = rows.pin_memory()
            held = self._flat[: len(self._flat) // self._row * self._row].view(-1, self._row)
            chosen = held.index_select(0, rows.to(held.device, non_blocking=True))
            return chosen.view(-1, self._channels, height, width), sizes
        canvas = self._flat.new_zeros(len(starts), self._channels, height, width)
        for place, start, (h, w) in zip(canvas, starts, sizes.tolist(), strict=True):
            values = self._flat[start : start + self._channels * h * w]
            place[:, :h, :w] = values.view(self._channels, h, w)
        return canvas, sizes


class _Headers(Dataset[int | str]):
    """Picture -> its count of pixels, or why it has none."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures.names)

    def __getitem__(self, i: int) -> int | str:
        try:
            return count_pixels(self._pictures.read(i), self._pictures.names[i])
        except (DataError, OSError) as error:
            return str(error)


class _Decoded(Dataset[Tensor | str]):
    """Picture -> uint8 [C, H, W], or why it cannot be read."""

    def __init__(self, pictures: Pictures, channels: int) -> None:
        self._pictures = pictures
        self._channels = channels

    def __len__(self) -> int:
        return len(self._pictures.names)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            values = decode_channels(
                self._pictures.read(i), self._pictures.names[i], self._channels
            )
        except (DataError, OSError) as error:
            return str(error)
        return torch.from_numpy(values)


def _pack(samples: Sequence[Tensor | str]) -> tuple[Tensor, list[tuple[int, ...] | str]]:
    """A worker's pictures as one tensor: each would travel as a file of its own."""
    flat = [each.flatten() for each in samples if isinstance(each, Tensor)]
    none = torch.empty(0, dtype=torch.uint8)
    return torch.cat([none, *flat]), [x if isinstance(x, str) else tuple(x.shape) for x in samples]


def _unpack(batch: tuple[Tensor, list[tuple[int, ...] | str]]) -> Iterator[Tensor | str]:
    flat, found = batch
    start = 0
    for each in found:
        if isinstance(each, str):
            yield each
        else:
            end = start + math.prod(each)
            yield flat[start:end].view(each)
            start = end


def _walk(
    dataset: Dataset[Any],
    count: int,
    title: str,
    workers: int,
    progress: bool,
    *,
    pack: Callable[[list[Any]], Any] = list,
    unpack: Callable[[Any], Iterable[Any]] = iter,
) -> Iterator[tuple[int, Any]]:
    """Every sample with its number, in order, made in workers, with a bar."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=32,
        collate_fn=pack,
        **worker_settings(workers),
    )
    samples = (sample for batch in loader for sample in unpack(batch))
    bar = tqdm(samples, desc=title, total=count, unit="picture", disable=not progress)
    yield from enumerate(bar)


def _check_memory(needed: int, count: int, device: torch.device, free: int | None) -> None:
    if free is None and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _SHARE * free:
        raise DataError(
            f"data.on_device = true: {count} pictures take {needed / 2**30:.2f} GiB decoded, more "
            f"than {_SHARE:.0%} of the {free / 2**30:.2f} GiB that are free on {device}; use "
            "data.on_device = false, or smaller pictures"
        )
