"""Where a few fixed pictures' CLS tokens look, kept as a run goes on for its report."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from backbone.architectures import Architecture
from backbone.preprocess import Preprocess
from training.config import Recipe
from training.decoding import decode
from training.distributed import World
from training.inspection import plain_backbone
from training.sources import DataError, Pictures, every

_PICTURE = 192  # side in pixels of the pictures that the report shows
_TRIES = 4  # pictures looked at for each that is wanted, where some are damaged


class Film(NamedTuple):
    """Attention maps over time.

    Attributes:
        pictures: the crops that were looked at, square, P of them.
        steps: when, ascending, T of them.
        epochs: that the steps ended in.
        maps: [T, P, heads, h, w]: of CLS to the patches in the last block; a map's sum is what
            CLS does not spend on itself.
    """

    pictures: list[Image.Image]
    steps: list[int]
    epochs: list[int]
    maps: npt.NDArray[np.float32]


def attention_maps(recipe: Recipe, pictures: Pictures, here: World) -> "AttentionMaps | None":
    """What follows the maps of `report.pictures` of the pictures, evenly spaced.

    None where there are none to follow: no pictures wanted or readable, a network without
    attention, or channels that picture files do not have.
    """
    if not recipe.architecture.has_attention or recipe.data.channels not in (1, 3, 4):
        return None
    found = fixed_pictures(pictures, recipe.report.pictures)
    return AttentionMaps(recipe, found, here) if found else None


class AttentionMaps:
    """Writes `attention/step_*.npz` and `attention/picture_*.png` in the run's folder.

    Pictures are seen at twice the size of the global crops, where details show. Rank 0 writes;
    every process must call `store` where weights are in shards.

    Args:
        pictures: fixed, RGB; see `fixed_pictures`.
    """

    def __init__(self, recipe: Recipe, pictures: Sequence[Image.Image], here: World) -> None:
        self._folder = Path(recipe.run_dir) / "attention"
        self._architecture: Architecture = recipe.architecture
        self._here = here
        patch = self._architecture.patch_size
        side = 2 * recipe.crops.global_size // patch * patch
        preprocess = Preprocess(resize=side, crop=side, mean=recipe.data.mean, std=recipe.data.std)
        shown = Preprocess(resize=_PICTURE, crop=_PICTURE, mean=(0.0,) * 3, std=(1 / 255,) * 3)
        self._inputs = torch.stack([preprocess.centre_crop(picture) for picture in pictures])
        self._pictures = [
            Image.fromarray(crop.round().to(torch.uint8).permute(1, 2, 0).numpy())
            for crop in map(shown.centre_crop, pictures)
        ]

    @torch.no_grad()  # inference mode cannot put shards together
    def store(self, step: int, epoch: int, backbone: nn.Module) -> None:
        """Keeps the maps of `backbone` (the teacher's) after `step` steps; the run is untouched."""
        plain = plain_backbone(backbone, self._architecture, self._here.device)
        if not self._here.is_main:
            return
        maps = []
        for picture in torch.split(self._inputs, 1):
            features = plain(picture.to(self._here.device), attention="cls")
            h, w = features.grid
            maps.append(features.attention[0, :, 1:].reshape(-1, h, w).float().cpu().numpy())
        self._folder.mkdir(parents=True, exist_ok=True)
        for i, shown in enumerate(self._pictures):
            shown.save(self._folder / f"picture_{i:02d}.png")
        path = self._folder / f"step_{step:09d}.npz"
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            np.savez_compressed(file, epoch=epoch, maps=np.stack(maps).astype(np.float16))
        temporary.replace(path)


def fixed_pictures(pictures: Pictures, count: int) -> list[Image.Image]:
    """At most `count` pictures that can be read, evenly spaced, the same each time."""
    found: list[Image.Image] = []
    some = every(pictures, _TRIES * count)
    step = max(1, len(some.names) // max(count, 1))
    order = [i for first in range(step) for i in range(first, len(some.names), step)]
    for i in order:
        if len(found) == count:
            break
        try:
            found.append(decode(some.read(i), some.names[i]))
        except (DataError, OSError):
            continue  # the run itself counts and lists it
    return found


def read_film(run_dir: Path) -> Film | None:
    """What was kept in a run's folder; None where there is nothing."""
    folder = run_dir / "attention"
    pictures = []
    for path in sorted(folder.glob("picture_*.png")):
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    found = []
    for path in sorted(folder.glob("step_*.npz")):
        with np.load(path, allow_pickle=False) as content:
            step = int(path.stem.removeprefix("step_"))
            found.append((step, int(content["epoch"]), content["maps"].astype(np.float32)))
    if not found or not pictures:
        return None
    newest = found[-1][2].shape  # older ones may be of another number of pictures
    steps, epochs, maps = zip(*(each for each in found if each[2].shape == newest), strict=True)
    return Film(pictures, list(steps), list(epochs), np.stack(maps))
