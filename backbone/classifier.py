"""A linear classifier on a published model's vectors: ONE .safetensors file beside the model's.

The header's `dinoscope_classifier` entry is a JSON object:

    format_version   1
    fingerprint      of the model that it was trained on (backbone.artifact)
    preprocessing    of that model: resize, crop, copy_size, mean, std (backbone.preprocess)
    descriptor       which of the model's vectors it takes (backbone.descriptors)
    classes          names, in the order of the logits
    base_lr, top1    the learning rate that trained it, and what it measured in percent

The tensors are `weight` [classes, D] and `bias` [classes], float32, as `torch.nn.Linear` has them.
Reading checks all of it against the model. Nothing is ever unpickled.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backbone.architectures import Architecture
from backbone.artifact import Artifact, ArtifactError, read_header
from backbone.descriptors import check_descriptors
from backbone.preprocess import Preprocess

FORMAT_VERSION = 1
_ENTRY = "dinoscope_classifier"
_FIELDS = ("fingerprint", "preprocessing", "descriptor", "classes", "base_lr", "top1")


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """One linear layer on the vectors of one model.

    Attributes:
        weight: [classes, D], float32.
        bias: [classes], float32.
        classes: their names, in the order of the logits.
        descriptor: the vectors that it takes, as `backbone.descriptors.describe` names them; they
            are not normalised.
        fingerprint: of the model.
        preprocess: of the model; its centre crop is what `top1` was measured on.
        base_lr: the learning rate for 256 pictures a step that trained it.
        top1: in percent, on the validation pictures.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    descriptor: str
    fingerprint: str
    preprocess: Preprocess
    base_lr: float
    top1: float

    def __call__(self, features: Tensor) -> Tensor:
        """Vectors [B, D] -> logits [B, classes]; weight and bias must lie on the same device."""
        return F.linear(features, self.weight, self.bias)


def descriptor_length(architecture: Architecture, name: str) -> int:
    """D, the length of the vectors that `backbone.descriptors.describe` gives by that name.

    Raises:
        ValueError: a descriptor that is unknown, or that the network does not have.
    """
    check_descriptors(architecture.skeleton(), [name])
    own, token = architecture.embed_dim, architecture.token_dim
    known = {"cls": own, "mean": token, "cls+mean": own + token, "copy": own + token}
    if name.startswith("last"):
        return own * int(name.removeprefix("last"))
    return known.get(name, own)  # block-N is one CLS


def write_classifier(classifier: Classifier, path: Path) -> None:
    """Writes the file as a whole or not at all.

    Raises:
        ArtifactError: shapes that do not fit each other, or values that are not finite.
        OSError: the file cannot be written.
    """
    tensors = {"weight": classifier.weight, "bias": classifier.bias}
    _check_tensors(tensors, len(classifier.classes), classifier.weight.shape[-1], path)
    header = {
        "format_version": FORMAT_VERSION,
        "fingerprint": classifier.fingerprint,
        "preprocessing": asdict(classifier.preprocess),
        "descriptor": classifier.descriptor,
        "classes": list(classifier.classes),
        "base_lr": classifier.base_lr,
        "top1": classifier.top1,
    }
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, temporary, metadata={_ENTRY: text})
    temporary.chmod(0o644)  # the library makes it the owner's alone; a service's user must read it
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_classifier(path: Path, artifact: Artifact) -> Classifier:
    """Reads a classifier that was trained on `artifact`, and checks it.

    Raises:
        ArtifactError: the file is missing, damaged, of another format, or another model's.
    """
    if not path.is_file():
        raise ArtifactError(f"classifier {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file.metadata() or {}, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error
    if header["fingerprint"] != artifact.fingerprint:
        raise ArtifactError(
            f"{path} was trained on the model with fingerprint {header['fingerprint']!r}; "
            f"this model's is {artifact.fingerprint!r}"
        )
    try:
        preprocess = Preprocess.from_json(header["preprocessing"])
        length = descriptor_length(artifact.architecture, header["descriptor"])
    except ValueError as error:
        raise ArtifactError(f"the header of {path}: {error}") from error
    if preprocess != artifact.preprocess:
        raise ArtifactError(f"the header of {path}: preprocessing is not the model's")
    _check_tensors(tensors, len(header["classes"]), length, path)
    return Classifier(
        weight=tensors["weight"],
        bias=tensors["bias"],
        classes=tuple(header["classes"]),
        descriptor=header["descriptor"],
        fingerprint=header["fingerprint"],
        preprocess=preprocess,
        base_lr=header["base_lr"],
        top1=header["top1"],
    )


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The header with every field of its kind."""
    wanted = "classifier that `python -m training.evaluation linear` or `finetune` wrote"
    header = read_header(metadata, path, entry=_ENTRY, version=FORMAT_VERSION, wanted=wanted)
    del header["format_version"]
    if set(header) != set(_FIELDS):
        raise ArtifactError(f"the header of {path} has {sorted(header)}, not {sorted(_FIELDS)}")
    classes = header["classes"]
    kinds = {
        "fingerprint": isinstance(header["fingerprint"], str),
        "preprocessing": isinstance(header["preprocessing"], dict),
        "descriptor": isinstance(header["descriptor"], str),
        "classes": isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and 0 < len(set(classes)) == len(classes),
        "base_lr": _is_number(header["base_lr"]),
        "top1": _is_number(header["top1"]),
    }
    for name, holds in kinds.items():
        if not holds:
            found = repr(header[name])[:80]
            raise ArtifactError(f"the header of {path}: {name} cannot be {found}")
    return header


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_tensors(tensors: Mapping[str, Tensor], classes: int, length: int, path: Path) -> None:
    expected = {"weight": [classes, length], "bias": [classes]}
    if set(tensors) != set(expected):
        raise ArtifactError(f"{path} holds {sorted(tensors)}, not {sorted(expected)}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if list(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ArtifactError(
                f"{name} in {path} is {tensor.dtype} {list(tensor.shape)}, not float32 {shape}"
            )
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"{name} in {path} holds values that are not finite")
