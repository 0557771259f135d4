"""A real network, tiny and untrained, in a file."""

from pathlib import Path

import torch

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.preprocess import Preprocess
from backbone.pretrained import NamedModel, load_model

ARCHITECTURE = Architecture(name="vit_tiny", patch_size=16, image_size=32)


def write_tiny_network(path: Path) -> NamedModel:
    """A ViT of 16-pixel patches that sees 32 pixels."""
    torch.manual_seed(0)
    network = ARCHITECTURE.build()
    for weights in network.parameters():  # away from the small values that it starts from
        weights.data += 0.05 * torch.randn_like(weights)
    write_artifact(
        Artifact(
            architecture=ARCHITECTURE,
            preprocess=Preprocess.in_proportion(32, patch_size=16),
            weights=network.state_dict(),
            provenance={"licence": "CC0-1.0"},
        ),
        path,
    )
    return load_model(str(path))
