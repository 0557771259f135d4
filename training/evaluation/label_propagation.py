"""Labels passed on from frame to frame by nearest patch tokens (paper, section 4.2.2).

The protocol is that of arXiv 2006.14613, as the original implementation has it. Legend: a frame's
patch tokens form a grid of h x w, D long and L2-normalised; C labels, the first the background.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training.evaluation.davis import Indices

_STRIP = 4  # rows of the grid that are compared at once; bounds the memory


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """How labels are passed on.

    Attributes:
        last_frames: how many frames before this one, beside the first, give their labels.
        radius: in patches; a patch takes labels from the square of 2 * radius + 1 patches a side
            around its place. 0 is no bound.
        topk: nearest tokens, over all of those frames, whose labels are mixed.
        temperature: they weigh exp(cosine / temperature).

    Raises:
        ValueError: a value that cannot be.
    """

    last_frames: int = 7
    radius: int = 12
    topk: int = 5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for field, least in (("last_frames", 0), ("radius", 0), ("topk", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}, not at least {least}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, not above 0 and finite")


def track(frames: Iterable[Tensor], first: Tensor, settings: Propagation) -> Iterator[Tensor]:
    """The labels [h, w, C] of every frame but the first, in their order.

    What is kept are the tokens of the first and the last few frames.

    Args:
        frames: of each its tokens [h, w, D], L2-normalised.
        first: the first frame's labels [h, w, C], on the same device.
    """
    rest = iter(frames)
    start = next(rest)
    last: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.last_frames)
    for tokens in rest:
        known, labels = zip((start, first), *last, strict=True)
        found = propagate(tokens, torch.stack(known), torch.stack(labels), settings)
        last.append((tokens, found))
        yield found


def propagate(target: Tensor, context: Tensor, labels: Tensor, settings: Propagation) -> Tensor:
    """What a frame's patches [h, w, D] take from n frames' labels: [h, w, C].

    Rows of the grid are compared a few at a time, each with the rows in its reach alone: at 480p
    with patches of 8 and 8 frames (60 x 104 tokens each) that is a matrix of 40 MB, where all with
    all would be one of 1.2 GB.

    Args:
        context: the tokens [n, h, w, D] that the labels [n, h, w, C] belong to.
    """
    n, h, w, _ = context.shape
    radius = settings.radius or max(h, w)
    places = torch.arange(max(h, w), device=target.device)
    near = (places[:, None] - places).abs() <= radius
    found = []
    for top in range(0, h, _STRIP):
        bottom = min(top + _STRIP, h)
        reach = slice(max(0, top - radius), min(h, bottom + radius))
        sources = context[:, reach].flatten(0, 2)
        cosine = target[top:bottom].flatten(0, 1) @ sources.T
        allowed = near[top:bottom, None, None, reach, None] & near[None, :w, None, None, :w]
        cosine.view(bottom - top, w, n, -1, w).masked_fill_(~allowed, -torch.inf)
        nearest, which = cosine.topk(min(settings.topk, len(sources)), dim=1)
        weights = (nearest / settings.temperature).softmax(dim=1)
        mixed = labels[:, reach].flatten(0, 2)[which]  # [patches of the strip, topk, C]
        found.append((weights[..., None] * mixed).sum(dim=1))
    return torch.cat(found).view(h, w, -1)


def to_labels(mask: Indices, *, objects: int, grid: tuple[int, int]) -> Tensor:
    """A mask of pixels -> labels [h, w, 1 + objects] of patches, each 0 or 1, by nearest pixels."""
    h, w = grid
    small = Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST)
    return F.one_hot(torch.from_numpy(np.array(small)).long(), 1 + objects).float()


def to_mask(labels: Tensor, *, patch_size: int, size: tuple[int, int]) -> Indices:
    """Labels [h, w, C] of patches -> a mask of `size` (width, height) pixels.

    They are enlarged bilinearly to the pixels that the network saw, each label stretched to 0 to 1,
    and the greatest chosen; from there to `size` by nearest pixels.
    """
    enlarged = F.interpolate(
        labels.permute(2, 0, 1)[None], scale_factor=patch_size, mode="bilinear", align_corners=False
    )[0]
    least, most = (bound(enlarged, dim=(1, 2), keepdim=True) for bound in (torch.amin, torch.amax))
    # What is the same everywhere cannot be stretched, and stays.
    stretched = torch.where(most > least, (enlarged - least) / (most - least), enlarged)
    numbers = stretched.argmax(dim=0).to(torch.uint8).cpu().numpy()
    return np.array(Image.fromarray(numbers).resize(size, Image.Resampling.NEAREST))
