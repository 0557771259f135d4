"""The Jaccard index of masked CLS attention and masks of objects (paper, fig. 4)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone.architectures import Backbone
from backbone.artifact import Artifact
from backbone.descriptors import mass_mask
from training.distributed import World, gather_rows
from training.evaluation.features import View, share
from training.evaluation.masks import ObjectMask, Pairs
from training.precision import autocast, autocast_dtype
from training.workers import worker_settings


class Cells(NamedTuple):
    """A mask's pixels in each patch of a grid: those of the object, and those that count; [N]."""

    inside: Tensor
    counted: Tensor


def cells(mask: ObjectMask, grid: tuple[int, int]) -> Cells:
    """Counts a mask's pixels [H, W] by the patch of `grid` (h, w) that each lies in.

    A pixel lies in the patch that holds its centre when the grid is stretched over the mask. So a
    patch stands for the same pixels as where the map [h, w] is upsampled to [H, W] by its nearest
    value, and the map need not be.
    """
    (height, width), (h, w) = mask.inside.shape, grid
    rows = (2 * np.arange(height) + 1) * h // (2 * height)
    columns = (2 * np.arange(width) + 1) * w // (2 * width)
    place = rows[:, None] * w + columns[None]
    inside, counted = (
        torch.from_numpy(np.bincount(place[pixels], minlength=h * w))
        for pixels in (mask.inside & mask.counted, mask.counted)
    )
    return Cells(inside, counted)


def jaccard(kept: Tensor, inside: Tensor, counted: Tensor) -> Tensor:
    """|A and B| / |A or B| of kept patches A and object B, in pixels: [...]; 0 to 1.

    Args:
        kept: booleans [..., N].
        inside: pixels of the object in each patch, broadcast to [..., N]; see `cells`.
        counted: all pixels in each patch that count, likewise.

    Returns:
        NaN where there is no object.
    """
    inside, counted = inside.double(), counted.double()
    both = (kept * inside).sum(dim=-1)
    objects = inside.sum(dim=-1)
    either = (kept * counted).sum(dim=-1) + objects - both
    return torch.where(objects > 0, both / either, torch.nan)


def score(attention: Tensor, inside: Tensor, counted: Tensor, masses: Sequence[float]) -> Tensor:
    """Jaccard index of each head, and last of the heads' mean map: [B, masses, A + 1].

    Args:
        attention: of CLS to the patches, CLS's own entry left out, [B, A, N].
        inside, counted: pixels in each patch, [B, N]; see `cells`.
        masses: the shares of the mass that are kept; see `backbone.descriptors.mass_mask`.
    """
    maps = torch.cat((attention, attention.mean(dim=1, keepdim=True)), dim=1)
    each = [jaccard(mass_mask(maps, mass), inside[:, None], counted[:, None]) for mass in masses]
    return torch.stack(each, dim=1)


def summarise(scores: Tensor) -> dict[str, Any]:
    """Means over the pictures that have an object; 0 to 1.

    Args:
        scores: of each picture the heads', and last the mean map's, [P, A + 1]; NaN where there is
            no object. At least one picture must have one.
    """
    found = scores[~scores[:, 0].isnan()]
    heads = found[:, :-1]
    return {
        "jaccard_best_head": heads.amax(dim=1).mean().item(),
        "jaccard_mean": heads.mean().item(),
        "jaccard_of_mean_map": found[:, -1].mean().item(),
        "jaccard_per_head": heads.mean(dim=0).tolist(),
    }


@torch.inference_mode()
def evaluate(
    artifact: Artifact,
    pairs: Pairs,
    *,
    size: int,
    masses: Sequence[float],
    here: World,
    precision: str = "fp32",
    batch_size: int = 16,
    workers: int = 2,
    title: str = "attention",
) -> Tensor:
    """Scores of every picture, [P, masses, A + 1], float64 on the CPU; see `score`.

    Each process takes its share and gets all. Views of one size, wherever they stand, go through
    the network together.

    Args:
        artifact: of a network with attention.
        size: the short side of a view in pixels; see `backbone.preprocess.Preprocess.whole`.

    Raises:
        DataError: a picture or mask that cannot be read, or masks of another size than pictures.
    """
    network = artifact.network().to(here.device)
    places = share(len(pairs.masks), here)
    shape = (len(places), len(masses), artifact.architecture.num_heads + 1)
    scores = torch.full(shape, torch.nan, dtype=torch.float64)
    loader = DataLoader(
        _Samples(pairs, places, view_of(artifact, size), artifact.architecture.patch_size),
        batch_size=None,
        pin_memory=here.device.type == "cuda",
        **worker_settings(workers),
    )
    with tqdm(
        total=len(places), unit="picture", desc=title, dynamic_ncols=True, disable=not here.is_main
    ) as bar:
        for batch in _alike(loader, batch_size):
            views, inside, counted = (
                torch.stack([getattr(sample, part) for sample in batch]).to(here.device)
                for part in ("view", "inside", "counted")
            )
            attention = cls_attention(network, views, here.device, precision)
            found = score(attention, inside, counted, masses).cpu()
            scores[[sample.place - places.start for sample in batch]] = found
            bar.update(len(batch))
    return gather_rows(scores.to(here.device), here).cpu()


def cls_attention(network: Backbone, views: Tensor, device: torch.device, precision: str) -> Tensor:
    """Of CLS to the patches in the last block, [B, A, N] float32."""
    with autocast(device, autocast_dtype(precision, device)):
        found: Tensor = network(views, attention="cls").attention
    return found[:, :, 1:].float()


def view_of(artifact: Artifact, size: int) -> View:
    """Picture -> the whole of it, its short side near `size`, both sides multiples of a patch."""

    def view(picture: Image.Image) -> Tensor:
        return artifact.preprocess.whole(
            picture, short_side=size, multiple=artifact.architecture.patch_size
        )

    return view


def default_size(artifact: Artifact) -> int:
    """The original looks at 480 pixels with networks trained on 224; others in proportion."""
    return round(artifact.preprocess.crop * 480 / 224)


class _Sample(NamedTuple):
    place: int
    view: Tensor
    inside: Tensor
    counted: Tensor


class _Samples(Dataset[_Sample]):
    def __init__(self, pairs: Pairs, places: range, view: View, patch_size: int) -> None:
        self._pairs, self._places, self._view = pairs, places, view
        self._patch_size = patch_size

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> _Sample:
        place = self._places[i]
        picture, mask = self._pairs.read(place)
        view = self._view(picture)
        height, width = view.shape[-2:]
        grid = (height // self._patch_size, width // self._patch_size)
        return _Sample(place, view, *cells(mask, grid))


def _alike(samples: Any, batch_size: int) -> Iterator[list[_Sample]]:
    """Batches of views of one size; at most 4 batches' views wait for others of their size."""
    waiting: dict[tuple[int, ...], list[_Sample]] = {}
    for sample in samples:
        of_size = waiting.setdefault(tuple(sample.view.shape), [])
        of_size.append(sample)
        if len(of_size) == batch_size:
            yield waiting.pop(tuple(sample.view.shape))
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()
