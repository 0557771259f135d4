"""The recipe of a run: frozen dataclasses, read from TOML and `key=value` overrides.

The defaults are the original implementation's. An unknown key is an error that names the nearest
known one; a value that cannot be is an error that names the field, the value and the rule.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbone.architectures import Architecture


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the key, the value and the rule."""


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key} = {value!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the pictures come from.

    Attributes:
        train: folders or tar files (compressed or not) of pictures; labels are not needed.
        workers: processes that decode and augment; 0 does it in the training process itself.
    """

    train: tuple[str, ...] = ()
    workers: int = 4

    def __post_init__(self) -> None:
        _require(bool(self.train), "data.train", list(self.train), "name a folder or a tar file")
        _require(self.workers >= 0, "data.workers", self.workers, "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The backbone; see `backbone.architectures`."""

    architecture: str = "vit_small"
    patch_size: int = 16
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.drop_path_rate < 1.0,
            "model.drop_path_rate",
            self.drop_path_rate,
            "must be at least 0 and below 1",
        )


@dataclass(frozen=True, kw_only=True)
class Head:
    """The projection head; see `training.dino.ProjectionHead`."""

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    batch_norm: bool = False
    norm_last_layer: bool = True

    def __post_init__(self) -> None:
        for name in ("out_dim", "hidden_dim", "bottleneck_dim", "layers"):
            value = getattr(self, name)
            _require(value >= 1, f"head.{name}", value, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Multi-crop: sizes in pixels, scales as shares of the picture's area."""

    global_size: int = 224
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_count: int = 8
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.4)

    def __post_init__(self) -> None:
        _require(self.local_count >= 0, "crops.local_count", self.local_count, "must be >= 0")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            rule = "must be two shares of the area, 0 < low <= high <= 1"
            _require(0.0 < low <= high <= 1.0, f"crops.{name}", [low, high], rule)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Temperatures and the centre; see `training.loss`."""

    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_epochs: int = 0
    center_momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
            value = getattr(self, name)
            _require(value > 0.0, f"loss.{name}", value, "must be above 0")
        epochs = self.warmup_teacher_epochs
        _require(epochs >= 0, "loss.warmup_teacher_epochs", epochs, "must be 0 or more")
        value = self.center_momentum
        _require(0.0 <= value <= 1.0, "loss.center_momentum", value, "must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The EMA's momentum at the first step; a cosine takes it to 1 at the last."""

    momentum: float = 0.996

    def __post_init__(self) -> None:
        rule = "must be from 0 to 1"
        _require(0.0 <= self.momentum <= 1.0, "teacher.momentum", self.momentum, rule)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer and its schedules.

    Attributes:
        lr: for a batch of 256 over all processes; the rate used is lr * batch / 256.
        clip_grad: the largest norm of each parameter's gradient; 0 does not clip.
    """

    name: str = "adamw"
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 10
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    clip_grad: float = 3.0
    freeze_last_layer_epochs: int = 1

    def __post_init__(self) -> None:
        known = ("adamw", "sgd", "lars")
        rule = f"must be one of {', '.join(known)}"
        _require(self.name in known, "optimizer.name", self.name, rule)
        _require(self.lr > 0.0, "optimizer.lr", self.lr, "must be above 0")
        names = ("min_lr", "weight_decay", "weight_decay_end", "clip_grad", "warmup_epochs")
        for name in (*names, "freeze_last_layer_epochs"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name}", value, "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run depends on.

    Attributes:
        run_dir: where logs and snapshots go; a run that finds its own snapshots there goes on.
        epochs: passes over the pictures.
        batch_size: pictures per process and step.
        seed: of weights, order and crops; the crops of a picture depend on nothing else.
        device: "auto", "cuda" or "cpu".
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on CUDA, fp32 on the CPU.
        log_steps: steps between two lines of the log.
        snapshot_steps: steps between two snapshots.
    """

    data: Data
    run_dir: str = "runs/dino"
    epochs: int = 100
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    log_steps: int = 10
    snapshot_steps: int = 1000
    model: Model = field(default_factory=Model)
    head: Head = field(default_factory=Head)
    crops: Crops = field(default_factory=Crops)
    loss: Loss = field(default_factory=Loss)
    teacher: Teacher = field(default_factory=Teacher)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_steps", "snapshot_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name, known in (("device", ("auto", "cpu", "cuda")), ("precision", _PRECISIONS)):
            value = getattr(self, name)
            _require(value in known, name, value, f"must be one of {', '.join(known)}")
        rule = "must be from 0 to 2**32 - 1"
        _require(0 <= self.seed < 2**32, "seed", self.seed, rule)
        try:
            architecture = self.architecture
        except ValueError as error:
            raise ConfigError(f"model and crops.global_size: {error}") from error
        local = self.crops.local_size
        rule = f"must hold a patch, model.patch_size = {architecture.patch_size}"
        _require(local >= architecture.patch_size, "crops.local_size", local, rule)
        warmup = self.optimizer.warmup_epochs
        rule = f"must be fewer than epochs = {self.epochs}"
        _require(warmup < self.epochs, "optimizer.warmup_epochs", warmup, rule)

    @property
    def architecture(self) -> Architecture:
        """The backbone that this recipe trains; its positions are those of the global crops."""
        return Architecture(
            name=self.model.architecture,
            patch_size=self.model.patch_size,
            image_size=self.crops.global_size,
        )


_PRECISIONS = ("auto", "fp32", "bf16")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a TOML file, then `key=value` overrides with dots for tables.

    A value is read as TOML where it is valid TOML, and as a plain string elsewhere, so that
    `run_dir=runs/a` and `data.train='["a.tar", "b.tar"]'` both say what they seem to.

    Raises:
        ConfigError: a file that is missing or not TOML, an unknown key, an impossible value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {str(path)!r} does not exist") from error
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    return recipe_from_dict(table)


def recipe_from_dict(table: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping (TOML or JSON) tells; raises `ConfigError` as `load_recipe`."""
    table = dict(table)
    table.setdefault("data", {})
    return typing.cast(Recipe, _build(Recipe, table, prefix=""))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """What `recipe_from_dict` reads back; plain values that JSON and TOML can hold."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(recipe)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    _require(bool(separator and key), "override", override, "must look like key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        _require(isinstance(table, dict), key, text, f"{parent} is a value, not a table")
    table[last] = value


def _build(cls: type, table: Mapping[str, Any], *, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"unknown key {name!r}; {_nearest(name)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            _require(isinstance(value, Mapping), name, value, "must be a table")
            values[key] = _build(typing.cast(type, hint), value, prefix=f"{name}.")
        else:
            values[key] = _convert(value, hint, name)
    return cls(**values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    if isinstance(hint, types.GenericAlias):
        items = [value] if isinstance(value, str) else value
        _require(isinstance(items, list), name, value, "must be a list")
        inner = hint.__args__
        if len(inner) == 2 and inner[1] is not Ellipsis:
            _require(len(items) == 2, name, value, "must have two numbers")
        return tuple(_convert(item, inner[0], name) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    _require(right, name, value, f"must be {words.get(hint, hint)}")
    if hint is float:
        _require(math.isfinite(value), name, value, "must be finite")
    return value


def _nearest(name: str) -> str:
    known = sorted(_keys(Recipe, ""))
    leaf = name.rpartition(".")[2]
    tables = {key.partition(".")[0] for key in known if "." in key}
    close = difflib.get_close_matches(name, [*known, *sorted(tables)], n=1, cutoff=0.5)
    close = close or [key for key in known if key.rpartition(".")[2] == leaf]
    close = close or [
        key
        for near in difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in known], n=1)
        for key in known
        if key.endswith(near)
    ]
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _keys(cls: type, prefix: str) -> list[str]:
    keys: list[str] = []
    for key, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys += _keys(typing.cast(type, hint), f"{prefix}{key}.")
        else:
            keys.append(f"{prefix}{key}")
    return keys
