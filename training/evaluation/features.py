"""A network's embeddings of many pictures, in order, with a progress bar."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone.artifact import Artifact
from training.decoding import decode
from training.precision import autocast, autocast_dtype
from training.sources import Pictures
from training.workers import worker_settings


class _Views(Dataset[Tensor]):
    def __init__(self, pictures: Pictures, view: Callable[[Image.Image], Tensor]) -> None:
        self._pictures = pictures
        self._view = view

    def __len__(self) -> int:
        return len(self._pictures.names)

    def __getitem__(self, i: int) -> Tensor:
        return self._view(decode(self._pictures.read(i), self._pictures.names[i]))


@torch.inference_mode()
def extract(
    pictures: Pictures,
    view: Callable[[Image.Image], Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 2,
    title: str = "features",
) -> Tensor:
    """Embeds every picture: [len(pictures), D], float32 on the CPU.

    Args:
        view: picture -> tensor, run in the workers.
        embed: batch of views on `device` -> [B, D].
    """
    loader = DataLoader(
        _Views(pictures, view),
        batch_size=batch_size,
        pin_memory=device.type == "cuda",
        **worker_settings(workers),
    )
    parts: list[Tensor] = []
    with tqdm(total=len(pictures.names), unit="picture", desc=title, dynamic_ncols=True) as bar:
        for batch in loader:
            parts.append(embed(batch.to(device, non_blocking=True)).float().cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def embedder(
    artifact: Artifact, device: torch.device, *, precision: str = "fp32"
) -> Callable[[Tensor], Tensor]:
    """Batches of views on `device` -> CLS of the artifact's network.

    `precision` is "fp32", or "bf16" for twice the speed at a rounding of one part in 256.
    """
    network = artifact.network().to(device)
    dtype = autocast_dtype(precision, device)

    def embed(batch: Tensor) -> Tensor:
        with autocast(device, dtype):
            cls: Tensor = network(batch).cls
        return cls.float()

    return embed


def class_indices(*labels: Sequence[str]) -> tuple[list[str], list[Tensor]]:
    """The sorted classes of several lists of labels, and each list as indices into them."""
    classes = sorted(set().union(*labels))
    index = {name: i for i, name in enumerate(classes)}
    return classes, [torch.tensor([index[name] for name in part]) for part in labels]
