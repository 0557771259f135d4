"""An artifact as functions from arrays to arrays; the service's way to the network."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from backbone.descriptors import copy_descriptor
from backbone.pictures import Mode
from backbone.pretrained import NamedModel

Array = npt.NDArray[np.float32]
Task = Literal["cls", "copy", "attention"]
TASKS: tuple[Task, ...] = ("cls", "copy", "attention")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the service says of its model.

    Attributes:
        fingerprint: vectors of models with different fingerprints cannot be compared.
        embedding_size: of the CLS embedding.
        copy_embedding_size: of the copy descriptor.
        input_size, patch_size: in pixels; a convolutional network has no patches.
        heads: of attention; 0 for a convolutional network, which has none.
        picture_mode: what the model sees of a picture: grey ("L"), "RGB" or "RGBA".
    """

    name: str
    fingerprint: str
    architecture: str
    embedding_size: int
    copy_embedding_size: int
    input_size: int
    patch_size: int | None
    heads: int
    picture_mode: Mode
    licence: str

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the model can do."""
        return TASKS if self.heads else tuple(task for task in TASKS if task != "attention")


class Encoder(Protocol):
    """What the service needs of a model; a fake one drives fast tests."""

    info: ModelInfo

    def prepare(self, task: Task, picture: Image.Image) -> Array:
        """RGB picture, RGBA for a model of those, -> input [C, H, W]; runs in decoding threads."""

    def run(self, task: Task, inputs: Sequence[Array]) -> list[Array]:
        """Inputs of one shape -> for each, CLS [D], copy descriptor, or maps [heads, h, w].

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
        ValueError: CUDA was asked for and is not there, or the model takes pictures of a number of
            channels that files do not hold.
    """

    def __init__(
        self, model: NamedModel, *, device: str = "auto", attention_pixels: int = 0
    ) -> None:
        self.info = model_info(model)
        self._device = torch.device(check_device(device))
        artifact = model.artifact
        self._network = artifact.network().to(self._device)
        self._preprocess = artifact.preprocess
        self._whitening = artifact.whitening
        self._patch = artifact.architecture.patch_size
        self._attention_pixels = attention_pixels or round(artifact.preprocess.crop * 480 / 224)

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


def model_info(model: NamedModel) -> ModelInfo:
    """What the service says of a model, before its network is built.

    Raises:
        ValueError: it takes pictures of a number of channels that files do not hold.
    """
    artifact = model.artifact
    architecture, preprocess = artifact.architecture, artifact.preprocess
    try:
        picture_mode = preprocess.mode
    except ValueError as error:
        raise ValueError(f"model {model.name!r} cannot be served: {error}") from error
    vit, patch = architecture.has_attention, architecture.patch_size
    return ModelInfo(
        name=model.name,
        fingerprint=artifact.fingerprint,
        architecture=f"{architecture.name}/{patch}" if vit else architecture.name,
        embedding_size=architecture.embed_dim,
        copy_embedding_size=architecture.embed_dim + architecture.token_dim,
        input_size=preprocess.crop,
        patch_size=patch if vit else None,
        heads=architecture.num_heads,
        picture_mode=picture_mode,
        licence=str(artifact.provenance.get("licence") or "unknown"),
    )


def check_device(device: str) -> str:
    """The device that the setting means.

    Raises:
        ValueError: it is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device here; use 'cpu'")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def batch_kind(task: Task, prepared: Array) -> Hashable:
    """What must be equal for two inputs to share a forward pass."""
    return task, prepared.shape


def runner(encoder: Encoder) -> Any:
    """`run` for a `Batcher` whose kinds are `batch_kind`'s."""

    def run(kind: tuple[Task, Any], inputs: Sequence[Array]) -> list[Array]:
        return encoder.run(kind[0], inputs)

    return run
