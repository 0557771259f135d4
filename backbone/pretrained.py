"""One way to name a model, everywhere: a known name, an artifact, or weights made elsewhere."""

import argparse
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from backbone.architectures import VITS, Architecture
from backbone.artifact import (
    Artifact,
    ArtifactError,
    check_weights,
    is_artifact,
    read_artifact,
    readable,
)
from backbone.hugging_face import CONFIG, Published, is_published, original_names, read_folder
from backbone.preprocess import Preprocess

DEFAULT_MODEL = Path(__file__).parent / "models" / "default.safetensors"


@dataclass(frozen=True, kw_only=True)
class Download:
    """Published weights: where they are, and the licence that they came under."""

    url: str
    licence: str = "Apache-2.0"


_DINO = "https://dl.fbaipublicfiles.com/dino"
DOWNLOADS: Mapping[str, Download] = MappingProxyType(
    {
        "dino_vits16": Download(
            url=f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
        ),
        "dino_vits8": Download(
            url=f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
        ),
        "dino_vitb16": Download(url=f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
        "dino_vitb8": Download(url=f"{_DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
        "dino_resnet50": Download(url=f"{_DINO}/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"),
    }
)

# torchvision's, told apart by the shapes of their weights; the published one comes first.
RESNETS = (
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model and the name that it goes by in answers and logs."""

    name: str
    artifact: Artifact


def load_model(model: str) -> NamedModel:
    """Loads what `--model`, `MODEL` and `DINOSCOPE_MODEL` name.

    Args:
        model: "default" (the model in the repository), a name in `DOWNLOADS` (downloaded once
            into torch's hub folder), a path to an artifact, or whatever `read_checkpoint` reads.

    Raises:
        ArtifactError: nothing by that name, or a file that cannot be used.
    """
    check_name(model)
    if model == "default":
        return NamedModel(name="default", artifact=read_artifact(DEFAULT_MODEL))
    if model in DOWNLOADS:
        path = _download(model, DOWNLOADS[model])
        artifact = read_checkpoint(path, provenance={"licence": DOWNLOADS[model].licence})
        return NamedModel(name=model, artifact=artifact)
    path = Path(model)
    ours = path.suffix == ".safetensors" and path.is_file() and is_artifact(path)
    return NamedModel(
        name=_own_name(path) if path.is_dir() else path.stem,
        artifact=read_artifact(path) if ours else read_checkpoint(path),
    )


def check_name(model: str) -> None:
    """Raises `ArtifactError` for what is no known name, file or published folder; reads nothing."""
    path = Path(model)
    known_name = model == "default" or model in DOWNLOADS
    if not known_name and not path.is_file() and not is_published(path):
        known = ["default", *DOWNLOADS]
        near = difflib.get_close_matches(model, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if (path / "snapshots").is_dir():
            hint = "; a run's folder is exported first: `python -m training.export`"
        elif path.is_dir():
            hint = f"; it is a folder without a {CONFIG}"
        raise ArtifactError(
            f"model {model!r} is neither a file nor one of {', '.join(known)}{hint}"
        )


def read_checkpoint(
    path: Path, *, key: str = "teacher", provenance: Mapping[str, Any] = MappingProxyType({})
) -> Artifact:
    """Reads weights that were made elsewhere; nothing in them is run.

    The architecture, a ViT or a ResNet, is told from the tensors' names and shapes, and sizes of
    pictures are the paper's. A full checkpoint of the original holds `student` and `teacher`, of
    which `key` is taken; `module.` and `backbone.` prefixes, the projection head and a classifier
    are removed.

    Args:
        path: an original DINO `.pth`, a `.safetensors` file of such tensors (timm names them in the
            same way), one of a transformers `ViTModel`, or a folder of the Hugging Face hub with
            either, which tells mean and deviation of its pictures (`backbone.hugging_face`).

    Raises:
        ArtifactError: a damaged file, or one that holds no ViT or ResNet of a known size.
    """
    published = read_folder(path) if path.is_dir() else None
    file = published.weights if published else path
    weights, _ = read_tensors(file, key=key)
    architecture = _architecture_of(weights, file)
    check_weights(weights, architecture, file)
    preprocess = Preprocess.in_proportion(
        architecture.image_size,
        patch_size=architecture.patch_size,
        channels=architecture.in_channels,
    )
    if published:
        preprocess = _as_published(preprocess, published, architecture, path)
    return Artifact(
        architecture=architecture,
        preprocess=preprocess,
        weights=weights,
        provenance={"source": _own_name(path), **provenance},
    )


def _as_published(
    preprocess: Preprocess, published: Published, architecture: Architecture, folder: Path
) -> Preprocess:
    """The preprocessing with a folder's own mean and deviation."""
    if published.num_heads not in (None, architecture.num_heads):
        raise ArtifactError(
            f"num_attention_heads in {folder / CONFIG} is {published.num_heads}; "
            f"a {architecture.name} has {architecture.num_heads}"
        )
    mean = preprocess.mean if published.mean is None else published.mean
    std = preprocess.std if published.std is None else published.std
    if len(mean) != architecture.in_channels:
        raise ArtifactError(
            f"{folder} tells the mean of {len(mean)} channels; its network takes "
            f"{architecture.in_channels}"
        )
    try:
        return replace(preprocess, mean=mean, std=std)
    except ValueError as error:
        raise ArtifactError(f"{folder}: {error}") from error


def _own_name(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name


def read_tensors(
    path: Path, *, key: str = "teacher"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file under the original's plain names: the backbone's, and the head's.

    For files see `read_checkpoint`. The head's are those of `training.dino.ProjectionHead`,
    `mlp.0.weight` and so on; there are none where the file holds a backbone alone.

    Raises:
        ArtifactError: a damaged file, or one that holds no table of tensors.
    """
    content = _load(path)
    if isinstance(content, dict) and key in content:
        content = content[key]
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a table of tensors")
    tensors = {str(k).removeprefix("module."): v for k, v in content.items()}
    head = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
    prefix = "backbone."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    weights = {k: v for k, v in tensors.items() if not k.startswith(("head.", "fc."))}
    for part in (weights, head):
        if wrong := sorted(k for k, v in part.items() if not isinstance(v, Tensor)):
            raise ArtifactError(f"{path} holds entries that are not tensors: {wrong[:3]}")
        if wrong := sorted(k for k, v in part.items() if not _is_plain(v)):
            raise ArtifactError(f"{path} holds tensors without values of their own: {wrong[:3]}")
    return original_names(weights, path), head


def _is_plain(tensor: Tensor) -> bool:
    """Whether all values of a tensor are there, each in a place of its own."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _load(path: Path) -> object:
    if path.suffix == ".safetensors":
        with readable(path):
            return load_file(path)
    try:
        # A full checkpoint carries its command line, a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load documents no exception types, and its message tells how to switch safety off.
        raise ArtifactError(
            f"{path} cannot be read safely: it is damaged, no checkpoint, or holds more than "
            "tensors and plain values"
        ) from error


def _architecture_of(weights: Mapping[str, Tensor], path: Path) -> Architecture:
    if "layer4.0.conv1.weight" in weights:
        return _resnet_of(weights, path)
    try:
        _, in_channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
        _, tokens, embed_dim = weights["pos_embed"].shape
    except (KeyError, ValueError) as error:
        raise ArtifactError(
            f"{path} holds no ViT of the original's form (no patch_embed.proj.weight or "
            "pos_embed) or of transformers' (no embeddings.cls_token), and no ResNet "
            f"(no layer4.0.conv1.weight); its first entries are {sorted(weights)[:3]}"
        ) from error
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for name, shape in VITS.items():
        if (shape.embed_dim, shape.depth) == (embed_dim, depth):
            try:
                return Architecture(
                    name=name,
                    patch_size=patch_size,
                    image_size=math.isqrt(max(0, tokens - 1)) * patch_size,
                    in_channels=in_channels,
                )
            except ValueError as error:
                raise ArtifactError(f"the weights in {path} do not fit: {error}") from error
    known = ", ".join(f"{n} ({s.embed_dim} x {s.depth})" for n, s in VITS.items())
    raise ArtifactError(
        f"{path} holds a ViT of width {embed_dim} and depth {depth}; known are {known}"
    )


def _resnet_of(weights: Mapping[str, Tensor], path: Path) -> Architecture:
    """The ResNet whose weights are most like these, whatever the channels of a picture."""
    shapes = _shapes(weights)
    found, most = RESNETS[0], 0
    for name in RESNETS:
        known = _shapes(Architecture(name=name).skeleton().state_dict())
        alike = len(shapes.items() & known.items())
        if alike > most:
            found, most = name, alike
        if shapes == known:
            break
    first = weights.get("conv1.weight")
    try:
        channels = 3 if first is None or first.ndim != 4 else first.shape[1]
        return Architecture(name=found, in_channels=channels)
    except ValueError as error:
        raise ArtifactError(f"the weights in {path} do not fit: {error}") from error


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    first = shapes.pop("conv1.weight", ())
    return {**shapes, "conv1.weight": first[:1] + first[2:]}


def _download(name: str, download: Download) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(download.url).name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.hub.download_url_to_file(download.url, str(partial), progress=True)
        read_checkpoint(partial)  # what was cut short must not be kept
        partial.replace(path)
    except (OSError, ArtifactError) as error:
        partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"model {name!r} could not be downloaded from {download.url}: {error}; "
            f"with the file at hand, put it at {path}, or give its path as the model"
        ) from error
    return path
