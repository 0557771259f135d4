"""The same model as it is used without care for speed: Pillow, torchvision, the network as it is.

What LitServe serves in `serving.py`, and one of its ceilings.
"""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from backbone.pretrained import load_model


class Textbook:
    """Args: model: as `--model`; device: torch's name."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        artifact = load_model(model).artifact
        preprocess = artifact.preprocess
        self._network = artifact.network().to(device)
        self._transform = v2.Compose(
            [
                v2.Resize(preprocess.resize, InterpolationMode.BICUBIC),
                v2.CenterCrop(preprocess.crop),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(preprocess.mean, preprocess.std),
            ]
        )

    def prepare(self, content: bytes) -> Tensor:
        """Encoded bytes -> the network's input [C, H, W]."""
        with Image.open(io.BytesIO(content)) as picture:
            made: Tensor = self._transform(picture.convert("RGB"))
            return made

    @torch.inference_mode()
    def embed(self, inputs: Sequence[Tensor]) -> Tensor:
        """Unit vectors [B, D]."""
        return torch.nn.functional.normalize(self._network(torch.stack(list(inputs))).cls, dim=1)
