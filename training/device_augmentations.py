"""The views of `training.augmentations`, taken on a device in batches.

Workers decode and draw: a `Drawn` picture each. `collate_drawn` pads them to one canvas; `augment`
makes the crops of all of them there, equal to Pillow's but for single levels. What the views say
reaches the device in one transfer, and nothing waits for the device.
"""

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.augmentations import JITTER, View, draw_views
from training.config import Crops
from training.decoding import decode_views, to_array
from training.device_operations import OPERATIONS, box_radius, crop_and_resize, hue_steps

Numbers = npt.NDArray[np.float64]

# A view as a row of numbers: what travels from a worker. Operations of jitter are numbered from 1.
_BOX = slice(0, 4)
_FLIP = 4
_JITTER = slice(5, 9)
_STRENGTH = slice(9, 13)
_GREY, _BLUR, _SOLARIZE = 13, 14, 15
_COLUMNS = 16

_MAX_ELEMENTS = 1 << 28
"""Of the largest intermediate tensor, in float32: 1 GiB. Larger batches are done in parts."""


class Drawn(NamedTuple):
    """One picture, uint8 [C, H, W], and the table of its views, float64 [V, 16]."""

    pixels: Tensor
    views: Tensor


class DrawnBatch(NamedTuple):
    """Pictures whose crops are yet to be made.

    Attributes:
        canvas: uint8 [B, C, H, W], each picture at the left and top of its own.
        sizes: int64 [B, 2], heights and widths; on the CPU.
        views: float64 [B, V, 16], see `view_table`; on the CPU.
    """

    canvas: Tensor
    sizes: Tensor
    views: Tensor


def view_table(views: Sequence[View]) -> Tensor:
    """Views as float64 [V, 16], which processes and batches pass on cheaply: see `_BOX` and on."""
    table = torch.zeros(len(views), _COLUMNS, dtype=torch.float64)
    rows = table.numpy()
    for row, view in zip(rows, views, strict=True):
        row[_BOX] = view.box
        row[_FLIP] = view.flip
        for i, (operation, strength) in enumerate(view.jitter):
            row[_JITTER.start + i] = 1 + JITTER.index(operation)
            row[_STRENGTH.start + i] = hue_steps(strength) if operation == "hue" else strength
        row[_GREY] = view.grey
        row[_BLUR] = 0.0 if view.blur_radius is None else box_radius(view.blur_radius)
        row[_SOLARIZE] = view.solarize
    return table


def draw_encoded(
    content: bytes, name: str, crops: Crops, rng: random.Random, *, channels: int = 3
) -> Drawn:
    """Decodes a picture, no larger than its views need, and draws them; for a worker.

    Raises:
        DataError: a picture that `training.decoding.decode_views` cannot read.
    """

    def draw(width: int, height: int) -> list[View]:
        return draw_views(width, height, crops, rng)

    picture, views = decode_views(content, name, draw, channels=channels, shrink=True)
    return Drawn(torch.from_numpy(to_array(picture)), view_table(views))


def collate_drawn(samples: Sequence[Drawn]) -> DrawnBatch:
    """Pads the pictures of a batch to the largest height and width; for a loader."""
    sizes = torch.tensor([sample.pixels.shape[1:] for sample in samples])
    height, width = sizes.amax(dim=0).tolist()
    channels = samples[0].pixels.shape[0]
    canvas = torch.zeros(len(samples), channels, height, width, dtype=torch.uint8)
    for place, sample in zip(canvas, samples, strict=True):
        place[:, : sample.pixels.shape[1], : sample.pixels.shape[2]] = sample.pixels
    return DrawnBatch(canvas, sizes, torch.stack([sample.views for sample in samples]))


def augment(
    canvas: Tensor, sizes: Tensor, views: Tensor, crops: Crops, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """The crops of a batch, on the canvas's device: as `multi_crop` makes them of each picture.

    Args:
        canvas: uint8 [B, C, H, W].
        sizes: int64 [B, 2], heights and widths; on the CPU.
        views: float64 [B, 2 + N, 16], see `view_table`; on the CPU.
        compiled: does every operation to every crop and takes those that its view has, in a few
            compiled kernels; else each operation is done to its own crops, in hundreds of them.

    Returns:
        uint8 [2, B, C, G, G] and [N, B, C, L, L].

    Raises:
        ValueError: the three do not belong together, or the views are not of `crops`.
    """
    _check(canvas, sizes, views, crops)
    with torch.no_grad(), torch.autocast(canvas.device.type, enabled=False):
        return (
            _augment_alike(canvas, sizes, views[:, :2], crops.global_size, compiled),
            _augment_alike(canvas, sizes, views[:, 2:], crops.local_size, compiled),
        )


def _augment_alike(
    canvas: Tensor, sizes: Tensor, views: Tensor, size: int, compiled: bool
) -> Tensor:
    """Views of one size, [B, V, 16] -> uint8 [V, B, C, size, size]."""
    b, c, h, w = canvas.shape
    v = views.shape[1]
    if v == 0:
        return torch.empty(0, b, c, size, size, dtype=torch.uint8, device=canvas.device)
    each = v * size * max(c * h, w, h, c * size) + c * h * w
    step = max(1, _MAX_ELEMENTS // each)
    parts = [
        _augment_part(
            canvas[i : i + step], sizes[i : i + step], views[i : i + step], size, compiled
        )
        for i in range(0, b, step)
    ]
    done = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if not compiled:
        return done
    (numbers,) = _send([_table(views)], canvas.device)
    rows = numbers.view(v * b, _COLUMNS).float()
    # Parts of a size that depends on the crops alone: each other one would be compiled anew.
    step = max(1, _MAX_ELEMENTS // (c * size * size))
    pairs = zip(torch.split(done.flatten(0, 1), step), torch.split(rows, step), strict=True)
    return torch.cat([_adjust_all_compiled()(*pair) for pair in pairs]).view(done.shape)


def _table(views: Tensor) -> Numbers:
    """Views [B, V, 16] in the order of their crops: [V * B, 16]."""
    table: Numbers = views.transpose(0, 1).reshape(-1, _COLUMNS).numpy()
    return table


def _augment_part(
    canvas: Tensor, sizes: Tensor, views: Tensor, size: int, only_resize: bool
) -> Tensor:
    """uint8 crops [V, B, C, size, size]; with `only_resize` float32, and not yet adjusted."""
    b, c = canvas.shape[:2]
    v = views.shape[1]
    steps = [] if only_resize else _steps(_table(views), colour=c == 3)
    numbers = _send(
        [
            sizes.double().numpy(),
            views[..., _BOX].numpy(),
            views[..., _FLIP].numpy(),
            *(part for _, indices, strengths in steps for part in (indices, strengths)),
        ],
        canvas.device,
    )
    done = crop_and_resize(
        canvas,
        numbers[0].view(b, 2),
        numbers[1].view(b, v, 4),
        numbers[2].view(b, v) > 0,
        size,
    )
    if only_resize:
        return done
    flat = done.flatten(0, 1)
    for (name, _, _), indices, strengths in zip(steps, numbers[3::2], numbers[4::2], strict=True):
        chosen = indices.long()
        strength = strengths.to(torch.float32).view(-1, 1, 1, 1)
        flat.index_copy_(0, chosen, OPERATIONS[name](flat.index_select(0, chosen), strength))
    return done.to(torch.uint8)


def _steps(table: Numbers, *, colour: bool) -> list[tuple[str, Numbers, Numbers]]:
    """What is done, in order: an operation, the crops that it is done to, and its strengths.

    Each crop has its own order of jitter: at each of the four places in it, every operation is done
    to the crops that have it there.
    """
    columns = [
        (name, table[:, stage] == 1 + number, table[:, stage - _JITTER.start + _STRENGTH.start])
        for stage in range(_JITTER.start, _JITTER.stop)
        for number, name in enumerate(JITTER)
    ]
    columns += [
        ("grey", table[:, _GREY] > 0, table[:, _GREY]),
        ("blur", table[:, _BLUR] > 0, table[:, _BLUR]),
        ("solarize", table[:, _SOLARIZE] > 0, table[:, _SOLARIZE]),
    ]
    steps = []
    for name, chosen, strengths in columns:
        if (colour or name not in ("saturation", "hue", "grey")) and chosen.any():
            indices = np.flatnonzero(chosen)
            steps.append((name, indices.astype(np.float64), strengths[indices]))
    return steps


def adjust_all(crops: Tensor, rows: Tensor) -> Tensor:
    """What `_steps` tells, in operations that all crops go through: shapes never change.

    Args:
        crops: float32 [n, C, H, W], whole numbers from 0 to 255.
        rows: float32 [n, 16], the views' tables.

    Returns:
        uint8 [n, C, H, W].
    """
    columns = rows[:, :, None, None, None].unbind(dim=1)
    colour = crops.shape[1] == 3
    jitter = [name for name in JITTER if colour or name not in ("saturation", "hue")]
    for stage in range(_JITTER.start, _JITTER.stop):
        strength, before = columns[stage - _JITTER.start + _STRENGTH.start], crops
        for name in jitter:
            done = OPERATIONS[name](before, strength)
            crops = torch.where(columns[stage] == 1 + JITTER.index(name), done, crops)
    if colour:
        crops = torch.where(columns[_GREY] > 0, OPERATIONS["grey"](crops, crops), crops)
    blurred = OPERATIONS["blur"](crops, columns[_BLUR])
    crops = torch.where(columns[_BLUR] > 0, blurred, crops)
    solarized = OPERATIONS["solarize"](crops, crops)
    return torch.where(columns[_SOLARIZE] > 0, solarized, crops).to(torch.uint8)


@cache
def _adjust_all_compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(adjust_all, dynamic=False)


def _send(arrays: Sequence[Numbers], device: torch.device) -> list[Tensor]:
    """Arrays -> flat float64 tensors on the device, by one transfer that nobody waits for."""
    ends = accumulate((array.size for array in arrays), initial=0)
    numbers = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    numbers = numbers.to(device, non_blocking=True)
    return [numbers[start:end] for start, end in pairwise(ends)]


def _check(canvas: Tensor, sizes: Tensor, views: Tensor, crops: Crops) -> None:
    count = 2 + crops.local_count
    found = [list(x.shape) for x in (canvas, sizes, views)]
    expected = f"uint8 canvas [B, C, H, W], sizes [B, 2] and views [B, {count}, {_COLUMNS}]"
    if (
        canvas.dtype != torch.uint8
        or canvas.ndim != 4
        or sizes.shape != (len(canvas), 2)
        or views.shape != (len(canvas), count, _COLUMNS)
    ):
        raise ValueError(f"canvas, sizes, views are {canvas.dtype} {found}; expected {expected}")
    largest = sizes.amax(dim=0).tolist()
    if largest[0] > canvas.shape[2] or largest[1] > canvas.shape[3]:
        raise ValueError(f"sizes up to {largest} do not fit a canvas of {list(canvas.shape[2:])}")
