"""An artifact as functions from arrays to arrays; the service's way to the network."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.architectures import Architecture
from backbone.attention import attention_row, rollout
from backbone.descriptors import describe
from backbone.pictures import Mode
from backbone.preprocess import Extent
from backbone.pretrained import NamedModel
from backbone.vit import VisionTransformer
from service.patch_maps import Point, patch_at
from service.precision import Precision, in_precision
from service.torch_threads import Fastest, measured, torch_threads

Array = npt.NDArray[np.float32]
Feature = Literal["cls", "last4", "cls+mean", "patches", "copy"]
FEATURES: tuple[Feature, ...] = get_args(Feature)
_FINEST = 480 / 224  # times the crop: the size of the original's attention maps
_ROWS = 512  # of a product; with more of them at once each costs little less
SPARE = 3.0
"""Pixels a side that a picture decoded at a reduced scale keeps for each pixel of a view.

With 2, embeddings keep a cosine of .9999 to those of the whole picture, but whitened ones, which
collections hold, fall to .9989; see docs/benchmarks.md.
"""


@dataclass(frozen=True, kw_only=True)
class AttentionTask:
    """Where one token of the whole picture looks: maps [heads, h, w], or [1, h, w] rolled out.

    Attributes:
        block: numbered from 0; None: rolled out over all of them.
        point: whose patch's attention is meant; None: that of CLS.
        resolution: see `TokensTask`.
    """

    block: int | None
    point: Point | None = None
    resolution: int | None = None

    def __str__(self) -> str:
        return "attention"


@dataclass(frozen=True, kw_only=True)
class TokensTask:
    """The patch tokens [h, w, D] of the whole picture.

    Attributes:
        resolution: pixels of the short side that the model sees; None: as many in all as it sees
            for an embedding, so that a map costs what an embedding costs.
    """

    resolution: int | None = None

    def __str__(self) -> str:
        return "tokens"


Task = Feature | TokensTask | AttentionTask
"""What the model is to do with a picture; a value that can be a key, whose `str` is a short name.

"cls", "last4", "cls+mean" and "copy" give vectors, "patches" the patch tokens [h, w, D] of the same
view as "cls", a `TokensTask` those of the whole picture, and an `AttentionTask` maps.
"""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the service says of its model.

    Attributes:
        fingerprint: vectors of models with different fingerprints cannot be compared.
        embedding_size: of the CLS embedding.
        copy_embedding_size: of the copy descriptor.
        input_size, patch_size: in pixels; a convolutional network has no patches.
        max_resolution: of a task about the whole picture, in pixels.
        heads: of attention; 0 for a convolutional network, which has none.
        blocks: transformer blocks; 0 for a convolutional network.
        features: those that the model has, and the length of each; of "patches", of one token.
        picture_mode: what the model sees of a picture: grey ("L"), "RGB" or "RGBA".
    """

    name: str
    fingerprint: str
    architecture: str
    embedding_size: int
    copy_embedding_size: int
    input_size: int
    patch_size: int | None
    max_resolution: int
    heads: int
    blocks: int
    features: dict[Feature, int]
    picture_mode: Mode
    licence: str

    @property
    def tasks(self) -> tuple[Task, ...]:
        """One of each kind and size that the model can do, to warm it up."""
        if not self.heads:
            return "cls", "copy"
        coarse = AttentionTask(block=self.blocks - 1)
        # However fine the maps that may be asked for, the start is not to take as long.
        side = min(self.max_resolution, round(_FINEST * self.input_size))
        return "cls", "copy", coarse, replace(coarse, resolution=side)


class Encoder(Protocol):
    """What the service needs of a model; a fake one drives fast tests.

    Attributes:
        batches_at_once: that are computed sooner beside each other than one after another.
    """

    info: ModelInfo
    batches_at_once: int

    def enough(self, shape: tuple[int, ...]) -> int:
        """How many inputs of a shape [C, H, W] cost about as little each as those of more."""

    def prepare(self, task: Task, picture: Image.Image, *, extent: Extent | None = None) -> Array:
        """RGB picture, RGBA for a model of those, -> input [C, H, W]; runs in decoding threads.

        Args:
            extent: where a picture that was decoded at a reduced scale ends.
        """

    def needed(self, task: Task, size: tuple[int, int]) -> tuple[int, int]:
        """How large (width, height) a picture of `size` must be decoded for `prepare`, at least."""

    def run(self, task: Task, inputs: Sequence[Array], *, at_once: int = 1) -> list[Array]:
        """Inputs of one shape -> for each what `Task` says, by one forward pass.

        Called by the model's threads.

        Args:
            at_once: batches that share the cores, this one among them.
        """

    def warm_up(self, task: Task, prepared: Array, *, most: int) -> None:
        """Runs what must have run once for requests to be fast, in batches of up to `most`."""

    def similarity(self, cls: Array) -> Array:
        """CLS embeddings [n, D] of any length -> what collections hold and search, [n, D]."""


class TorchEncoder:
    """The encoder of a loaded model, in evaluation mode.

    On a CUDA device the network is compiled, and batches are filled up to powers of two, so that
    `warm_up` meets every shape that comes.

    Args:
        device: "auto", "cpu" or "cuda".
        max_resolution: see `ModelInfo`; 0 is 480/224 of the model's crop, as the original draws
            attention.
        precision: see `service.precision`.
        compiled: None: where the device is CUDA.
        threads: on the CPU; None is torch's own number.

    Raises:
        ValueError: CUDA was asked for and is not there, or the model takes pictures of a number of
            channels that files do not hold.
    """

    def __init__(
        self,
        model: NamedModel,
        *,
        device: str = "auto",
        max_resolution: int = 0,
        precision: Precision = "fp32",
        compiled: bool | None = None,
        threads: int | None = None,
    ) -> None:
        self.info = model_info(model, precision, max_resolution=max_resolution)
        self._device = torch.device(check_device(device))
        artifact = model.artifact
        network = artifact.network().to(self._device)
        tokens = (artifact.preprocess.crop // (artifact.architecture.patch_size or 1)) ** 2 + 1
        self._network = in_precision(network, precision, self._device, tokens=tokens)
        self._precision = precision
        self._compiled = self._device.type == "cuda" if compiled is None else compiled
        if self._compiled:
            self._network.compile(dynamic=False)
        on_cores = self._device.type == "cpu" and not self._compiled
        if isinstance(self._network, VisionTransformer):
            self._network.fixed_weights = on_cores
        self._threads = (threads or torch.get_num_threads()) if on_cores else 1
        self.batches_at_once = self._threads
        self._fastest: dict[int, Fastest] = {}  # by the numbers of an input
        self._preprocess = artifact.preprocess
        self._whitening = artifact.whitening
        self._patch = artifact.architecture.patch_size

    def prepare(self, task: Task, picture: Image.Image, *, extent: Extent | None = None) -> Array:
        """See `Encoder`: squashed for copies, whole for maps, else the centre crop."""
        if task == "copy":
            view = self._preprocess.squash(picture, multiple=self._patch, extent=extent)
        elif isinstance(task, TokensTask | AttentionTask):
            short = self._short_side(task, *(extent or picture.size))
            view = self._preprocess.whole(
                picture, short_side=short, multiple=self._patch, extent=extent
            )
        else:
            view = self._preprocess.centre_crop(picture, extent=extent)
        return view.numpy()

    def needed(self, task: Task, size: tuple[int, int]) -> tuple[int, int]:
        """See `Encoder`: `SPARE` pixels a side for each of the view's own."""
        if task == "copy":
            view = (self._preprocess.squash_side(multiple=self._patch),) * 2
        elif isinstance(task, TokensTask | AttentionTask):
            short = self._short_side(task, *size)
            view = self._preprocess.whole_size(*size, short_side=short, multiple=self._patch)
        else:
            view = self._preprocess.centre_crop_size(*size)
        return math.ceil(SPARE * view[0]), math.ceil(SPARE * view[1])

    def run(self, task: Task, inputs: Sequence[Array], *, at_once: int = 1) -> list[Array]:
        """See `Encoder`; on the CPU each batch has its share of the cores."""
        batch = torch.from_numpy(np.stack(inputs))
        if self._compiled:
            batch = F.pad(batch, (0, 0) * 3 + (0, _bucket(len(inputs)) - len(inputs)))
        autocast = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._precision == "bf16"
        )
        with self._cores(task, inputs, at_once), torch.inference_mode(), autocast:
            results = self._results(task, batch.to(self._device)).float().cpu()
        return list(results[: len(inputs)].numpy())

    def enough(self, shape: tuple[int, ...]) -> int:
        """See `Encoder`: as many as have `_ROWS` tokens."""
        return math.ceil(_ROWS / (1 + math.prod(shape[-2:]) // self._patch**2))

    def warm_up(self, task: Task, prepared: Array, *, most: int) -> None:
        """See `Encoder`: every power of two where the network is compiled."""
        for size in self.batch_sizes(most):
            self.run(task, [prepared] * size)
        size = prepared.size
        if self._threads > 1 and size not in self._fastest:

            def once(number: int) -> None:
                self._fastest[size] = Fastest({number: 0.0})
                self.run(task, [prepared])

            self._fastest[size] = Fastest(measured(self._threads, once))

    def batch_sizes(self, most: int) -> list[int]:
        """Those, up to `most`, that must have run once for the first request to be fast."""
        if not self._compiled:
            return [1]
        return [1 << i for i in range(_bucket(most).bit_length())]

    def similarity(self, cls: Array) -> Array:
        """See `Encoder`: whitened where the model brings a whitening, else as they are."""
        if self._whitening is None:
            return cls
        return self._whitening.apply(torch.from_numpy(cls)).numpy()

    def _short_side(self, task: TokensTask | AttentionTask, width: float, height: float) -> float:
        """Of the whole picture as the model sees it, in pixels."""
        if task.resolution is not None:
            return task.resolution
        return min(self._preprocess.even_short_side(width, height), self.info.max_resolution)

    @contextmanager
    def _cores(self, task: Task, inputs: Sequence[Array], at_once: int) -> Iterator[None]:
        """A batch's share of them; no more than is fastest for the input most like these."""
        if self._device.type != "cpu" or self._compiled:
            yield
            return
        size, share = inputs[0].size, max(1, self._threads // at_once)
        near = min(self._fastest, key=lambda other: abs(math.log(other / size)), default=0)
        fastest = self._fastest.get(near)
        number = share if fastest is None else min(fastest.now, share)
        started = time.perf_counter()
        with torch_threads(number):
            yield
        is_rollout = isinstance(task, AttentionTask) and task.block is None
        if fastest is None or len(inputs) > 1 or is_rollout:
            return
        if 0.7 < size / near < 1.4:  # else it does not tell how long what was measured takes
            fastest.took(number, (time.perf_counter() - started) * near / size)

    def _results(self, task: Task, batch: Tensor) -> Tensor:
        if isinstance(task, AttentionTask):
            return self._attention(task, batch)
        if isinstance(task, TokensTask) or task == "patches":
            features = self._network(batch)
            tokens: Tensor = features.patches.unflatten(1, features.grid)
            return tokens
        if task == "cls" and isinstance(self._network, VisionTransformer) and not self._compiled:
            return self._network.forward_cls([batch])  # the last block for CLS alone
        return describe(self._network, batch, [task])[task]

    def _attention(self, task: AttentionTask, batch: Tensor) -> Tensor:
        network = self._network
        if not isinstance(network, VisionTransformer):
            raise ValueError(f"the model {self.info.name!r} has no attention")
        grid = (batch.shape[2] // self._patch, batch.shape[3] // self._patch)
        query = 0  # CLS
        if task.point is not None:
            row, column = patch_at(task.point, grid)
            query = 1 + row * grid[1] + column
        if task.block is not None:
            rows = attention_row(network, batch, block=task.block, query=query)
        else:
            # One by one: rolling out holds what every block was given.
            rows = torch.cat([rollout(network, one[None], query=query) for one in batch])[:, None]
        return rows[..., 1:].reshape(*rows.shape[:2], *grid)


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _features(architecture: Architecture) -> dict[Feature, int]:
    vector, token = architecture.embed_dim, architecture.token_dim
    lengths: dict[Feature, int] = {
        "cls": vector,
        "last4": 4 * vector,
        "cls+mean": vector + token,
        "patches": token,
        "copy": vector + token,
    }
    return {
        name: length
        for name, length in lengths.items()
        if name != "last4" or architecture.depth >= 4
    }


def model_info(
    model: NamedModel, precision: Precision = "fp32", *, max_resolution: int = 0
) -> ModelInfo:
    """What the service says of a model, before its network is built; see `TorchEncoder`.

    A precision other than fp32 is a part of the fingerprint: its vectors are near those of fp32,
    and not the same.

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
        fingerprint=artifact.fingerprint + ("" if precision == "fp32" else f"-{precision}"),
        architecture=f"{architecture.name}/{patch}" if vit else architecture.name,
        embedding_size=architecture.embed_dim,
        copy_embedding_size=architecture.embed_dim + architecture.token_dim,
        input_size=preprocess.crop,
        patch_size=patch if vit else None,
        max_resolution=max_resolution or round(_FINEST * preprocess.crop),
        heads=architecture.num_heads,
        blocks=architecture.depth,
        features=_features(architecture),
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
