"""J and F of video segmentation, as DAVIS defines them (Perazzi et al., CVPR 2016).

J is the Jaccard index of two masks, F the harmonic mean of precision and recall of their
boundaries. Masks are boolean arrays [H, W] of one object in one frame.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

TOLERANCE = 0.008
"""How far two boundaries may lie apart and still match, as a share of the frame's diagonal."""

_RECALLED = 0.5  # a frame counts for recall where its measure is above this
_QUARTERS = 4


class Statistics(NamedTuple):
    """What a measure was over a sequence's frames.

    Attributes:
        mean: over the frames.
        recall: the share of frames above one half.
        decay: the mean of the first quarter less that of the last: what is lost over time.
    """

    mean: float
    recall: float
    decay: float


def jaccard(mask: Mask, truth: Mask) -> float:
    """J, the intersection over the union; 1 where both are empty.

    Raises:
        ValueError: masks of two sizes.
    """
    _check_sizes(mask, truth)
    union = int(np.count_nonzero(mask | truth))
    return int(np.count_nonzero(mask & truth)) / union if union else 1.0


def boundary_f(mask: Mask, truth: Mask, *, tolerance: float = TOLERANCE) -> float:
    """F: 1 where both are without boundary, 0 where one of them is.

    A pixel of one boundary matches where one of the other lies at most
    ceil(tolerance * diagonal) pixels away.

    Raises:
        ValueError: masks of two sizes.
    """
    _check_sizes(mask, truth)
    found, wanted = boundary(mask), boundary(truth)
    found_count, wanted_count = int(found.sum()), int(wanted.sum())
    if found_count == 0 or wanted_count == 0:
        return float(found_count == wanted_count)
    radius = math.ceil(tolerance * math.hypot(*mask.shape))
    precision = np.count_nonzero(found & dilate(wanted, radius)) / found_count
    recall = np.count_nonzero(wanted & dilate(found, radius)) / wanted_count
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Mask) -> Mask:
    """The pixels that differ from their neighbour at the right, below, or below at the right.

    Neighbours outside of the frame differ from nothing, so that its border is no boundary.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def dilate(mask: Mask, radius: int) -> Mask:
    """The pixels at most `radius` pixels away from one of the mask: dilation by a disk.

    Works through the mask's pixels, which are few in a boundary, once for each place of the disk.
    """
    height, width = mask.shape
    grown = np.zeros((height + 2 * radius, width + 2 * radius), dtype=np.bool_)
    rows, columns = np.nonzero(mask)
    for dy in range(-radius, radius + 1):
        reach = math.isqrt(radius**2 - dy**2)
        for dx in range(-reach, reach + 1):
            grown[rows + radius + dy, columns + radius + dx] = True
    return grown[radius : radius + height, radius : radius + width]


def statistics(per_frame: Sequence[float]) -> Statistics:
    """Mean, recall and decay of a measure over the frames of a sequence, in their order.

    The quarters share the frames that they meet in, as in the official code.

    Raises:
        ValueError: no frame.
    """
    values = np.asarray(per_frame, dtype=np.float64)
    if values.size == 0:
        raise ValueError("statistics of no frame: there must be at least one")
    # Halves are rounded up, where Python and NumPy would round them to the even number.
    ends = np.floor(np.linspace(0, values.size - 1, _QUARTERS + 1) + 0.5).astype(np.intp)
    first, last = values[: ends[1] + 1], values[ends[-2] :]
    return Statistics(
        mean=float(values.mean()),
        recall=float((values > _RECALLED).mean()),
        decay=float(first.mean() - last.mean()),
    )


def _check_sizes(mask: Mask, truth: Mask) -> None:
    if mask.shape != truth.shape:
        raise ValueError(f"masks of {list(mask.shape)} and {list(truth.shape)} pixels: must be one")
