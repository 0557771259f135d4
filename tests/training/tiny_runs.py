"""Real runs of the loss on tiles of real pictures, small enough to take seconds."""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from backbone.preprocess import IMAGENET_MEAN, IMAGENET_STD
from backbone.vit import VisionTransformer
from training.augmentations import Bytes, multi_crop, normalise
from training.config import Crops
from training.dino import Network, ProjectionHead, make_teacher
from training.loss import DinoLoss
from training.optimizers import make_optimizer
from training.pretrain import train_step
from training.rates import Rates
from training.state import Training

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
CROPS = Crops(global_size=16, local_count=0, local_size=8)
BATCH = 8


class Row(NamedTuple):
    """Means over ten steps."""

    step: int
    entropy: float
    kl: float


def tiles(side: int = 32, across: int = 4) -> list[Image.Image]:
    """The pictures of the documentation, cut into 16 each."""
    found = []
    for path in sorted(PICTURES.glob("*.jpg")):
        with Image.open(path) as picture:
            width, height = picture.width // across, picture.height // across
            found += [
                picture.resize((side, side), box=(x, y, x + width, y + height))
                for y in range(0, height * across, height)
                for x in range(0, width * across, width)
            ]
    return found


@cache
def _crops() -> list[tuple[Bytes, Bytes]]:
    rng = random.Random(0)
    return [multi_crop(tile, CROPS, rng) for tile in tiles() for _ in range(4)]


def rows(
    steps: int,
    *,
    out_dim: int,
    lr: float = 1e-3,
    momentum: float = 0.99,
    temperature: float = 0.04,
    **loss: bool,
) -> Iterator[Row]:
    """Trains a small network with `training.pretrain.train_step`."""
    torch.manual_seed(0)
    rng = random.Random(0)
    made = _crops()
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def network() -> Network:
        backbone = VisionTransformer(
            image_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2
        )
        return Network(backbone, ProjectionHead(32, out_dim, hidden_dim=64, bottleneck_dim=256))

    student = network()
    training = Training(
        student=student,
        parallel=student,
        teacher=make_teacher(student, network()),
        loss=DinoLoss(out_dim, **loss),
        optimizer=make_optimizer("adamw", student),
        clip_grad=3.0,
        autocast=None,
    )
    recent: list[Tensor] = []
    for step in range(1, steps + 1):
        batch = [rng.choice(made) for _ in range(BATCH)]
        crops = [
            crop
            for part in zip(*batch, strict=True)
            for crop in normalise(torch.stack([torch.from_numpy(c) for c in part], 1), mean, std)
        ]
        rates = Rates(
            lr=lr * min(1.0, step / 20),
            weight_decay=0.04,
            teacher_momentum=momentum,
            teacher_temperature=temperature,
            last_layer_frozen=step < 5,
        )
        terms = train_step(training, [crops], rates).terms
        recent.append(torch.stack((terms.teacher_entropy, terms.kl)))
        if step % 10 == 0:
            entropy, kl = torch.stack(recent).mean(dim=0).tolist()
            recent.clear()
            yield Row(step, entropy, kl)
