"""A model with random weights, in a file."""

from pathlib import Path

import torch

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.preprocess import Preprocess
from backbone.whitening import Whitening


def write_tiny_model(path: Path, *, whitened: bool = False) -> str:
    """Writes a ViT of 8-pixel patches; returns its path as `--model` takes it."""
    torch.manual_seed(0)
    architecture = Architecture(name="vit_tiny", patch_size=8, image_size=16)
    dimension = architecture.embed_dim
    artifact = Artifact(
        architecture=architecture,
        preprocess=Preprocess(resize=24, crop=24, copy_size=24),
        weights=architecture.build().state_dict(),
        whitening=Whitening(torch.zeros(dimension), torch.eye(dimension)) if whitened else None,
    )
    write_artifact(artifact, path)
    return str(path)
