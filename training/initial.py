"""Weights that a run starts from: a published model, an artifact, a checkpoint, or another run."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.artifact import ArtifactError
from backbone.hugging_face import CONFIG, is_published
from backbone.pretrained import DOWNLOADS, load_model, read_tensors
from training import snapshot
from training.tables import ConfigError

_POSITIONS = "pos_embed"
_SHOWN = 3  # misfits that a message names


def load_initial(name: str, student_backbone: nn.Module, head: nn.Module) -> str:
    """Copies given weights into a student's backbone and, where they bring a fitting one, its head.

    To be called before the teacher is made from the student, and before either is wrapped. Names
    and shapes must be the backbone's own; only a ViT's positions may be of another grid, and are
    interpolated. A head that does not fit is left as it is. Nothing is changed where an error is
    raised.

    Args:
        name: the folder of a run (its newest snapshot's teacher), an original `.pth` checkpoint (of
            a full one the teacher), or whatever else `backbone.pretrained.load_model` takes, which
            brings no head.
        student_backbone: a `VisionTransformer` or `ConvNet`.
        head: a `training.dino.ProjectionHead`.

    Returns:
        One line that tells what was taken.

    Raises:
        ConfigError: nothing by that name, a file that cannot be used, or weights that do not fit;
            the first misfits are named.
    """
    try:
        weights, found_head = _read(name)
        weights, resized = _at_grid_of(student_backbone, weights)
        _check_fit(weights, student_backbone)
    except (ArtifactError, snapshot.SnapshotError, _Misfit) as error:
        raise ConfigError(f"init_from = {name!r}: {error}") from error
    why_afresh = _why_afresh(found_head, head)
    student_backbone.load_state_dict(weights)
    if not why_afresh:
        head.load_state_dict(found_head)
    return (
        f"init_from {name}: backbone taken{resized}; "
        f"head {f'starts afresh: {why_afresh}' if why_afresh else 'taken'}"
    )


class _Misfit(ValueError):
    """Weights that are not the backbone's."""


def _read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a backbone and of a head under their plain names; of the head maybe none."""
    path = Path(name)
    is_run = path.is_dir() and ((path / "snapshots").is_dir() or not is_published(path))
    if is_run and name not in ("default", *DOWNLOADS):
        found = snapshot.newest_good(path)
        if found is None:
            raise _Misfit(
                "this folder holds no snapshot (snapshots/step_*.pt) and no published network "
                f"({CONFIG})"
            )
        teacher: dict[str, Tensor] = found.state["teacher"]
        return _below("backbone.", teacher), _below("head.", teacher)
    if path.is_file() and path.suffix != ".safetensors":
        return read_tensors(path)
    return dict(load_model(name).artifact.weights), {}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _at_grid_of(backbone: nn.Module, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights with positions [1, 1 + n * n, D] of the backbone's grid; and what was done.

    Bicubic, by the sizes of the grids. The original's shift by a tenth of a patch
    (`VisionTransformer.positions`) is not wanted in weights that are trained on.
    """
    old, new = weights.get(_POSITIONS), backbone.state_dict().get(_POSITIONS)
    if old is None or new is None or old.ndim != 3 or old.shape == new.shape:
        return weights, ""
    n, m = math.isqrt(max(0, old.shape[1] - 1)), math.isqrt(new.shape[1] - 1)
    if n == 0 or 1 + n * n != old.shape[1] or old.shape[2] != new.shape[2]:
        return weights, ""  # not positions of ours, which the check of the shapes tells
    grid = old[:, 1:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(m, m), mode="bicubic", align_corners=False)
    resized = torch.cat((old[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    said = f" (positions interpolated, bicubic, from {n} x {n} patches to {m} x {m})"
    return {**weights, _POSITIONS: resized}, said


def _check_fit(weights: Mapping[str, Tensor], backbone: nn.Module) -> None:
    """Raises `_Misfit` where the weights are not the backbone's, or not finite."""
    if misfits := _misfits(weights, backbone):
        raise _Misfit(
            "these weights are not of the recipe's network "
            f"(model.architecture, model.patch_size, data.channels): {_first(misfits)}"
        )
    if infinite := [k for k, v in weights.items() if not bool(v.isfinite().all())]:
        raise _Misfit(f"weights that are not finite: {_first(infinite)}")


def _why_afresh(found: Mapping[str, Tensor], head: nn.Module) -> str:
    """Why a head cannot be taken; empty where it can."""
    if not found:
        return "there is none in it"
    if misfits := _misfits(found, head):
        return f"the one in it is another ({_first(misfits)})"
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        return "the one in it is not finite"
    # Of a student's head the last layer's gains alone may be frozen, and are then meant to be 1.
    frozen = [name for name, parameter in head.named_parameters() if not parameter.requires_grad]
    if any(bool((found[name] != 1).any()) for name in frozen):
        return "its last layer's gains were trained, and head.norm_last_layer is true"
    return ""


def _misfits(found: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """What is missing, unknown or of another shape, in the order of the module's own tensors."""
    wanted = module.state_dict()
    misfits = []
    for name, tensor in wanted.items():
        if name not in found:
            misfits.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            there, here = list(found[name].shape), list(tensor.shape)
            misfits.append(f"{name} is {there} there and {here} in the recipe")
    return misfits + [f"{name} is unknown" for name in found if name not in wanted]


def _first(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
