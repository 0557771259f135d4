"""An artifact as functions from arrays to arrays; the service's way to the network."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from backbone.descriptors import copy_descriptor
from backbone.pretrained import NamedModel

Array = npt.NDArray[np.float32]
Task = Literal["cls", "copy", "attention"]
TASKS: tuple[Task, ...] = ("cls", "copy", "attention")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the service says of its model.

    Attributes:
        fingerprint: vectors of models with different fingerprints cannot be compared.
        embedding_size: of the CLS embedding; the copy descriptor is twice as long.
        input_size, patch_size: in pixels.
    """

    name: str
    fingerprint: str
    architecture: str
    embedding_size: int
    input_size: int
    patch_size: int
    heads: int
    licence: str


class Encoder(Protocol):
    """What the service needs of a model; a fake one drives fast tests."""

    info: ModelInfo

    def prepare(self, task: Task, picture: Image.Image) -> Array:
        """RGB picture -> input [C, H, W] for `task`; runs in decoding threads."""

    def run(self, task: Task, inputs: Sequence[Array]) -> list[Array]:
        """Inputs of one shape -> for each, CLS [D], copy descriptor [2 D], or maps [heads, h, w].

        Runs in the model's one thread.
        """

    def similarity(self, cls: Array) -> Array:
        """CLS embeddings [n, D] of any length -> what collections hold and search, [n, D]."""


class TorchEncoder:
    """The encoder of a loaded model, in float32, in evaluation mode.

    Args:
        device: "auto", "cpu" or "cuda".
        attention_pixels: short side of the attention's input; 0 is 480/224 of the model's crop,
            as the original draws it.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """

    def __init__(
        self, model: NamedModel, *, device: str = "auto", attention_pixels: int = 0
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but torch finds no CUDA device here; use 'cpu'")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        artifact = model.artifact
        self._network = artifact.network().to(self._device)
        self._preprocess = artifact.preprocess
        self._whitening = artifact.whitening
        self._patch = artifact.architecture.patch_size
        self._attention_pixels = attention_pixels or round(artifact.preprocess.crop * 480 / 224)
        self.info = ModelInfo(
            name=model.name,
            fingerprint=artifact.fingerprint,
            architecture=f"{artifact.architecture.name}/{self._patch}",
            embedding_size=artifact.architecture.embed_dim,
            input_size=artifact.preprocess.crop,
            patch_size=self._patch,
            heads=artifact.architecture.num_heads,
            licence=str(artifact.provenance.get("licence") or "unknown"),
        )

    def prepare(self, task: Task, picture: Image.Image) -> Array:
        """See `Encoder`: centre crop for CLS, squashed for copies, whole for attention."""
        if task == "cls":
            view = self._preprocess.centre_crop(picture)
        elif task == "copy":
            view = self._preprocess.squash(picture, multiple=self._patch)
        else:
            view = self._preprocess.whole(
                picture, short_side=self._attention_pixels, multiple=self._patch
            )
        return view.numpy()

    def run(self, task: Task, inputs: Sequence[Array]) -> list[Array]:
        """See `Encoder`."""
        batch = torch.from_numpy(np.stack(inputs)).to(self._device)
        with torch.inference_mode():
            if task == "attention":
                features = self._network(batch, attention="cls")
                maps = features.attention[..., 1:].unflatten(-1, features.grid)
                return list(maps.cpu().numpy())
            features = self._network(batch)
            vectors = features.cls if task == "cls" else copy_descriptor(features)
            return list(vectors.float().cpu().numpy())

    def similarity(self, cls: Array) -> Array:
        """See `Encoder`: whitened where the model brings a whitening, else as they are."""
        if self._whitening is None:
            return cls
        return self._whitening.apply(torch.from_numpy(cls)).numpy()


def batch_kind(task: Task, prepared: Array) -> Hashable:
    """What must be equal for two inputs to share a forward pass."""
    return task, prepared.shape


def runner(encoder: Encoder) -> Any:
    """`run` for a `Batcher` whose kinds are `batch_kind`'s."""

    def run(kind: tuple[Task, Any], inputs: Sequence[Array]) -> list[Array]:
        return encoder.run(kind[0], inputs)

    return run
