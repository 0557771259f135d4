"""Folders of the Hugging Face hub: a ViT of transformers, or a network of timm.

Such a folder has `config.json`, `model.safetensors` or `pytorch_model.bin`, and of transformers
perhaps `preprocessor_config.json`. timm names its tensors as the original does; transformers' names
are given in the original's.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.artifact import ArtifactError

CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LARGEST_EPSILON = 1e-5  # of a LayerNorm; ours is the original's, 1e-6

_OUTSIDE_OF_BLOCKS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_OF_A_BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_IN_A_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_QKV = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
_TIMMS, _TRANSFORMERS = ("mean", "std"), ("image_mean", "image_std")
# quickgelu is another activation; resnetaa50 and resnetblur50 pool in another way: the tensors are
# the same.
_TIMMS_PLAIN = re.compile(
    r"(vit|deit)_(?!.*quickgelu)|resnet\d+$|resnext\d+_\d+x\d+d$|wide_resnet\d+_\d+$"
)
# Arguments that change nothing, or shapes, which tell of themselves.
_HARMLESS = {
    *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "dynamic_img_size"),
    *("num_classes", "global_pool", "drop_rate", "drop_path_rate"),
}
# What has no part in embeddings: a layer on CLS for other tasks, and the token of hidden patches.
_UNUSED = ("pooler.", "embeddings.mask_token")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a folder says of its network.

    Attributes:
        weights: the file of the tensors.
        mean, std: of each channel, on a scale of 0 to 1; both None where the folder does not tell.
        num_heads: attention heads; None where the folder does not tell.
    """

    weights: Path
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    num_heads: int | None


def is_published(folder: Path) -> bool:
    """Whether this is a folder with a `config.json`."""
    return (folder / CONFIG).is_file()


def read_folder(folder: Path) -> Published:
    """Finds the weights in a folder, and how the network wants its pictures.

    Raises:
        ArtifactError: files that are missing or cannot be read, or a network that computes
            something else than the original's.
    """
    config = _read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        shards = (folder / f"{_WEIGHTS[0]}.index.json").is_file()
        why = "; its weights lie in several files, which are not read" if shards else ""
        raise ArtifactError(f"{folder} holds neither {' nor '.join(_WEIGHTS)}{why}")
    mean, std = _normalisation(config, folder)
    return Published(
        weights=weights, mean=mean, std=std, num_heads=config.get("num_attention_heads")
    )


def original_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a transformers `ViTModel` under the original's names; others as they are.

    Query, key and value of a block, three tensors of [D, D] there, are one of [3 D, D] here.

    Raises:
        ArtifactError: a block's query, key and value do not go together, or a tensor has two names.
    """
    prefix = "vit." if any(name.startswith("vit.embeddings.") for name in tensors) else ""
    if f"{prefix}embeddings.cls_token" not in tensors:
        return dict(tensors)
    below = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    named: dict[str, Tensor] = {}
    for name, tensor in below.items():
        own = _original_name(name)
        if found := _QKV.fullmatch(name):
            block, which, part = found.groups()
            if which != "query":
                continue  # it is joined with the query
            own, tensor = f"blocks.{block}.attn.qkv.{part}", _joined(below, name, path)
        elif name.startswith(_UNUSED):
            continue
        if own in named:
            raise ArtifactError(f"{path} holds {own} under two names")
        named[own] = tensor
    return named


def _normalisation(
    config: dict[str, Any], folder: Path
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation: transformers' from a file of its own, timm's from the configuration."""
    timm = config.get("pretrained_cfg", config)  # of old versions, on its own level
    said, names, said_in = timm if isinstance(timm, dict) else {}, _TIMMS, folder / CONFIG
    if (folder / _PREPROCESSOR).is_file():
        own = _read_json(folder / _PREPROCESSOR)
        _check_scaling(own, folder / _PREPROCESSOR)
        if own.keys() & set(_TRANSFORMERS):
            said, names, said_in = own, _TRANSFORMERS, folder / _PREPROCESSOR
    mean, std = (_numbers(said, name, said_in) for name in names)
    if (mean is None) != (std is None):
        raise ArtifactError(f"{said_in} has one of {' and '.join(names)} without the other")
    return mean, std


def _check_scaling(preprocessor: dict[str, Any], path: Path) -> None:
    """Refuses pictures that are not brought to 0 to 1, or not normalised."""
    for field in ("do_rescale", "do_normalize"):
        if preprocessor.get(field, True) is not True:
            raise ArtifactError(f"{field} in {path} is {preprocessor[field]!r}; true can be read")
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ArtifactError(f"rescale_factor in {path} is {factor!r}; 1/255 can be read")


def _original_name(name: str) -> str:
    table, before, rest = _OUTSIDE_OF_BLOCKS, "", name
    if found := _IN_A_BLOCK.fullmatch(name):
        table, before, rest = _OF_A_BLOCK, f"blocks.{found[1]}.", found[2]
    if rest in table:
        return before + table[rest]
    stem, _, part = rest.rpartition(".")
    return f"{before}{table[stem]}.{part}" if stem in table else name


def _joined(tensors: Mapping[str, Tensor], query: str, path: Path) -> Tensor:
    names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
    if missing := [name for name in names if name not in tensors]:
        raise ArtifactError(f"{path} holds {query} without {' and '.join(missing)}")
    parts = [tensors[name] for name in names]
    if any(p.shape != parts[0].shape or p.dtype != parts[0].dtype or not p.ndim for p in parts):
        shapes = ", ".join(f"{p.dtype} {list(p.shape)}" for p in parts)
        raise ArtifactError(f"{path}: {', '.join(names)} differ: {shapes}")
    return torch.cat(parts)


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Refuses what transformers or timm tell of a network that computes something else."""
    name, given = config.get("architecture"), config.get("model_args") or {}
    if name is not None and not (isinstance(name, str) and _TIMMS_PLAIN.match(name)):
        raise ArtifactError(
            f"architecture in {path} is {name!r}; timm's plain ViTs (vit_*, deit_*) and the "
            "ResNets that torchvision has can be read"
        )
    if not isinstance(given, dict) or given.keys() - _HARMLESS:
        raise ArtifactError(
            f"model_args in {path} are {given!r}; {', '.join(sorted(_HARMLESS))} can be read"
        )
    wanted = {"model_type": "vit", "hidden_act": "gelu"}
    for field, value in wanted.items():
        if config.get(field, value) != value:
            raise ArtifactError(f"{field} in {path} is {config[field]!r}; {value!r} can be read")
    heads = config.get("num_attention_heads", 1)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ArtifactError(f"num_attention_heads in {path} is {heads!r}, not a count")
    epsilon = config.get("layer_norm_eps", 0)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon <= _LARGEST_EPSILON:
        raise ArtifactError(
            f"layer_norm_eps in {path} is {epsilon!r}; from 0 to {_LARGEST_EPSILON} can be read "
            "(1e-6 is used, as in the original)"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _numbers(content: Mapping[str, Any], field: str, path: Path) -> tuple[float, ...] | None:
    value = content.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(n, int | float) and not isinstance(n, bool) for n in value
    ):
        raise ArtifactError(f"{field} in {path} is {value!r}, not a list of numbers")
    try:
        return tuple(float(n) for n in value)
    except OverflowError as error:
        raise ArtifactError(f"{field} in {path}: {error}") from error
