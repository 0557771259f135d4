"""A published model: ONE .safetensors file whose header tells everything needed to use it.

The header's `dinoscope` entry is a JSON object:

    format_version   1
    architecture     name, patch_size, image_size, in_channels (backbone.architectures)
    preprocessing    resize, crop, copy_size, mean, std (backbone.preprocess)
    provenance       how it was made: free JSON, `licence` among it
    quality          what it measured: free JSON, e.g. {"knn": {"20": {"top1": .., "top5": ..}}}

The tensors are the network's (the running statistics of a BatchNorm are buffers among them), and
optionally `whitening.mean` and `whitening.matrix` (backbone.whitening), which a service applies to
what it searches.

Reading checks all of it, and every tensor's name, shape and finiteness. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backbone.architectures import Architecture, Backbone
from backbone.preprocess import Preprocess
from backbone.whitening import Whitening

FORMAT_VERSION = 1
_ENTRY = "dinoscope"
_WHITENING = ("whitening.mean", "whitening.matrix")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ArtifactError(ValueError):
    """A model file that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A network's description and weights.

    Attributes:
        weights: name -> tensor, in the precision that they are stored in.
        whitening: applied to embeddings before they are searched; None leaves them as they are.
    """

    architecture: Architecture
    preprocess: Preprocess
    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    whitening: Whitening | None = None

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits (of a SHA-256) over all that decides on the vectors.

        Vectors of models with different fingerprints cannot be compared. Provenance and quality
        have no part in it: a better description does not make another model. Nor have whole
        numbers: they are BatchNorm's counts of the batches it has seen.
        """
        described = [asdict(self.architecture), asdict(self.preprocess)]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name, tensor in sorted({**self.weights, **_whitening_tensors(self.whitening)}.items()):
            if not tensor.is_floating_point():
                continue
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def network(self) -> Backbone:
        """The network in evaluation mode, float32, on the CPU."""
        network = self.architecture.build()
        network.load_state_dict(dict(self.weights))  # copies 16 bits into 32
        return network.eval().requires_grad_(False)


def half_precision(weights: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The parameters in float16: half the size. Buffers stay as they are.

    A BatchNorm's running variance may lie outside of float16's range, and takes no room.
    """
    buffers = {name for name, _ in architecture.skeleton().named_buffers()}
    return {name: w if name in buffers else w.half() for name, w in weights.items()}


def write_artifact(artifact: Artifact, path: Path) -> str:
    """Writes the file as a whole or not at all; returns its fingerprint.

    Raises:
        ArtifactError: preprocessing or weights do not fit the architecture, or the weights are
            not finite.
    """
    _check_sizes(artifact.preprocess, artifact.architecture, path)
    check_weights(artifact.weights, artifact.architecture, path)
    _check_whitening(_whitening_tensors(artifact.whitening), artifact.architecture, path)
    header = {
        "format_version": FORMAT_VERSION,
        "architecture": asdict(artifact.architecture),
        "preprocessing": asdict(artifact.preprocess),
        "provenance": dict(artifact.provenance),
        "quality": dict(artifact.quality),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    tensors = {**artifact.weights, **_whitening_tensors(artifact.whitening)}
    weights = {name: w.detach().cpu().contiguous() for name, w in tensors.items()}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    save_file(weights, temporary, metadata={_ENTRY: text})
    temporary.chmod(0o644)  # the library makes it the owner's alone; a service's user must read it
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    return artifact.fingerprint


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises `ArtifactError` in the place of what reading a safetensors file raises."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error


def is_artifact(path: Path) -> bool:
    """Whether a safetensors file says that it is one of ours.

    Raises:
        ArtifactError: it is no safetensors file.
    """
    with readable(path), safe_open(path, framework="pt") as file:
        return _ENTRY in (file.metadata() or {})


def read_artifact(path: Path) -> Artifact:
    """Reads and checks a model file.

    Raises:
        ArtifactError: the file is missing, damaged, of another format, or contradicts itself.
    """
    if not path.is_file():
        raise ArtifactError(f"model file {str(path)!r} does not exist")
    with readable(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        header = _header(metadata, path)
        architecture, preprocess = _parts(header, path)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    whitening = {name: weights.pop(name) for name in _WHITENING if name in weights}
    check_weights(weights, architecture, path)
    _check_whitening(whitening, architecture, path)
    return Artifact(
        architecture=architecture,
        preprocess=preprocess,
        weights=weights,
        provenance=header["provenance"],
        quality=header["quality"],
        whitening=Whitening(*(whitening[name] for name in _WHITENING)) if whitening else None,
    )


def read_header(
    metadata: Mapping[str, str], path: Path, *, entry: str, version: int, wanted: str
) -> dict[str, Any]:
    """The JSON object in a safetensors file's header, of a format version that is known.

    Args:
        metadata: of the file at `path`.
        entry: the name that the object stands under.
        wanted: what the file should be, for people.

    Raises:
        ArtifactError: no such entry, no JSON object, or another version.
    """
    if entry not in metadata:
        raise ArtifactError(f"{path} has no {entry!r} entry in its header: it is no {wanted}")
    try:
        header = json.loads(metadata[entry])
    except json.JSONDecodeError as error:
        raise ArtifactError(f"the header of {path} is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"the header of {path} is not a JSON object")
    found = header.get("format_version")
    if found != version:
        raise ArtifactError(f"{path} has format version {found!r}; this program reads {version}")
    return header


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    wanted = "model that `python -m training.export` wrote"
    header = read_header(metadata, path, entry=_ENTRY, version=FORMAT_VERSION, wanted=wanted)
    for name in ("architecture", "preprocessing", "provenance", "quality"):
        if not isinstance(header.get(name), dict):
            raise ArtifactError(f"the header of {path} has no object {name!r}")
    return header


def _parts(header: dict[str, Any], path: Path) -> tuple[Architecture, Preprocess]:
    described = header["architecture"]
    known = set(Architecture.__dataclass_fields__)
    if set(described) != known:
        raise ArtifactError(
            f"architecture in the header of {path} has the fields {sorted(described)}, "
            f"not {sorted(known)}"
        )
    try:
        architecture = Architecture(**described)
        preprocess = Preprocess.from_json(header["preprocessing"])
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"the header of {path}: {error}") from error
    _check_sizes(preprocess, architecture, path)
    return architecture, preprocess


def _check_sizes(preprocess: Preprocess, architecture: Architecture, path: Path) -> None:
    if len(preprocess.mean) != architecture.in_channels:
        raise ArtifactError(
            f"the header of {path}: preprocessing has {len(preprocess.mean)} channels, "
            f"the architecture {architecture.in_channels}"
        )
    try:
        architecture.check_side("crop", preprocess.crop)
    except ValueError as error:
        raise ArtifactError(f"the header of {path}: {error}") from error


def check_weights(weights: Mapping[str, Tensor], architecture: Architecture, path: Path) -> None:
    """Checks names, shapes, types and finiteness of the weights that `path` holds or will hold.

    Raises:
        ArtifactError: they are not those of the architecture, or not finite.
    """
    expected = architecture.skeleton().state_dict()
    missing, unknown = (
        sorted(expected.keys() - weights.keys()),
        sorted(weights.keys() - expected.keys()),
    )
    if missing or unknown:
        raise ArtifactError(
            f"the weights in {path} are not those of {architecture.name}: "
            f"missing {missing[:3]}{_more(missing)}, unknown {unknown[:3]}{_more(unknown)}"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ArtifactError(
                f"{name} in {path} has shape {list(tensor.shape)}, not {list(expected[name].shape)}"
            )
        if not expected[name].is_floating_point():  # a BatchNorm's count of batches
            if tensor.dtype != expected[name].dtype:
                raise ArtifactError(
                    f"{name} in {path} is {tensor.dtype}, not {expected[name].dtype}"
                )
            continue
        if tensor.dtype not in _DTYPES:
            raise ArtifactError(f"{name} in {path} is {tensor.dtype}, not a 16 or 32 bit float")
        if not math.isfinite(tensor.float().abs().max().item()):
            raise ArtifactError(f"{name} in {path} holds values that are not finite")


def _whitening_tensors(whitening: Whitening | None) -> dict[str, Tensor]:
    if whitening is None:
        return {}
    return dict(zip(_WHITENING, (whitening.mean, whitening.matrix), strict=True))


def _check_whitening(tensors: Mapping[str, Tensor], architecture: Architecture, path: Path) -> None:
    if not tensors:
        return
    dimension = architecture.embed_dim
    for name, shape in zip(_WHITENING, ([dimension], [dimension, dimension]), strict=True):
        if name not in tensors:
            raise ArtifactError(f"{path} holds one half of a whitening: {name} is missing")
        tensor = tensors[name]
        if list(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ArtifactError(
                f"{name} in {path} is {tensor.dtype} {list(tensor.shape)}, not float32 {shape}"
            )
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{name} in {path} holds values that are not finite")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""
