"""A network's vectors of many pictures, in chunks and in order, with a progress bar."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbone.artifact import Artifact
from backbone.descriptors import check_descriptors, describe
from training.decoding import decode
from training.distributed import World, gather_rows
from training.evaluation.loading import Views, batches, side_by_side
from training.precision import autocast, autocast_dtype
from training.sources import Pictures
from training.workers import worker_settings

View = Callable[[Image.Image], Tensor]
"""Picture -> normalised tensor [C, H, W], run in the workers."""

Embed = Callable[[Tensor], Mapping[str, Tensor]]
"""Batch of views on the device -> vectors [B, D] by descriptor, float32 on the same device."""


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
    workers: int = 2,
    title: str = "features",
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Embeds this process's share, batch by batch: places [B] and vectors [B, D] on its device.

    Nothing is kept: what is asked of a million pictures can be asked of each batch.

    Args:
        batch_size: 1 where views differ in size.

    Raises:
        DataError: a picture that cannot be read; it is named.
    """
    places = share(len(pictures.names), here)

    def make(i: int) -> tuple[int, Tensor]:
        place = places[i]
        return place, view(decode(pictures.read(place), pictures.names[place]))

    loader = DataLoader(
        Views(make, len(places)),
        batch_size=batch_size,
        collate_fn=side_by_side,
        pin_memory=here.device.type == "cuda",
        **worker_settings(workers),
    )
    with tqdm(
        total=len(places), unit="picture", desc=title, dynamic_ncols=True, disable=not here.is_main
    ) as bar:
        for at, batch in batches(loader):
            yield at, dict(embed(batch.to(here.device, non_blocking=True)))
            bar.update(len(batch))


def extract(
    pictures: Pictures,
    view: View,
    embed: Embed,
    *,
    here: World,
    batch_size: int = 256,
    workers: int = 2,
    title: str = "features",
) -> dict[str, Tensor]:
    """The vectors of every picture in one matrix for each descriptor, [N, D] float32 on the CPU.

    Every process computes its share and gets all of them. For sets whose vectors fit the memory;
    see `stream` for others.

    Raises:
        DataError: a picture that cannot be read; it is named.
    """
    parts: dict[str, list[Tensor]] = {}
    for _, found in stream(
        pictures, view, embed, here=here, batch_size=batch_size, workers=workers, title=title
    ):
        for name, vectors in found.items():
            parts.setdefault(name, []).append(vectors.cpu())
    return {name: gather_rows(torch.cat(each), here) for name, each in parts.items()}


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
