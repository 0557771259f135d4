"""The recipe of a run: frozen dataclasses, read from TOML and `key=value` overrides.

The defaults are the original implementation's. `training.tables` reads; what stands here checks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from backbone.architectures import Architecture
from backbone.preprocess import IMAGENET_MEAN, IMAGENET_STD
from training import auto
from training.tables import ConfigError, build, override, plain, read, require

__all__ = ["ConfigError", "Recipe", "load_recipe", "recipe_from_dict", "recipe_to_dict"]


def _one_of(key: str, value: str, *known: str) -> None:
    require(value in known, key, value, f"must be one of {', '.join(known)}")


def _at_least(least: int, prefix: str, table: object, *names: str) -> None:
    for name in names:
        value = getattr(table, name)
        require(value >= least, f"{prefix}{name}", value, f"must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the pictures come from.

    Attributes:
        train: folders, tar files (compressed or not), Parquet files, or `.txt` lists of files;
            labels are not needed.
        workers: processes that decode and augment; 0 does it in the training process itself, which
            is the fastest where a CPU trains.
        stream: reads tar and Parquet shards from front to back instead of at random.
        shuffle_buffer: pictures that a worker holds to shuffle a stream.
        channels: of a picture; 3 is RGB.
        mean, std: of each channel on a scale of 0 to 1; ImageNet's where left out for 3 channels,
            0.5 and 0.25 for other counts.
        augment: where crops are made: "workers" (Pillow), "device" (in batches), or "auto":
            on the device where that is CUDA.
        on_device: holds all pictures decoded in the device's memory.
    """

    train: tuple[str, ...] = ()
    workers: int = 4
    stream: bool = False
    shuffle_buffer: int = 2048
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: str = "auto"
    on_device: bool = False

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", list(self.train), "name a folder or a tar file")
        _at_least(0, "data.", self, "workers")
        _at_least(1, "data.", self, "shuffle_buffer", "channels")
        _one_of("data.augment", self.augment, "auto", "workers", "device")
        rgb = self.channels == 3
        mean = self.mean or (IMAGENET_MEAN if rgb else (0.5,) * self.channels)
        std = self.std or (IMAGENET_STD if rgb else (0.25,) * self.channels)
        for name, values in (("mean", mean), ("std", std)):
            rule = f"must have one number a channel, data.channels = {self.channels}"
            require(len(values) == self.channels, f"data.{name}", list(values), rule)
            object.__setattr__(self, name, tuple(values))
        require(all(v > 0 for v in std), "data.std", list(std), "must be above 0")
        rule = "must be false with data.stream = true: a stream is read anew each epoch"
        require(not (self.on_device and self.stream), "data.on_device", self.on_device, rule)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The backbone; see `backbone.architectures`. `patch_size` matters to ViTs alone."""

    architecture: str = "vit_small"
    patch_size: int = 16
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        rate = self.drop_path_rate
        require(0.0 <= rate < 1.0, "model.drop_path_rate", rate, "must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Head:
    """The projection head; see `training.dino.ProjectionHead`."""

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck: bool = True
    bottleneck_dim: int = 256
    layers: int = 3
    activation: str = "gelu"
    batch_norm: bool = False
    norm_last_layer: bool = True
    predictor: bool = False

    def __post_init__(self) -> None:
        _at_least(1, "head.", self, "out_dim", "hidden_dim", "bottleneck_dim", "layers")
        _one_of("head.activation", self.activation, "gelu", "relu")
        rule = "must be false with head.bottleneck = false: it stands behind the bottleneck"
        require(self.bottleneck or not self.predictor, "head.predictor", self.predictor, rule)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Multi-crop: sizes in pixels, scales as shares of the picture's area.

    Attributes:
        blur: the deviation of the Gaussian blur in pixels of the crop, from and to; the paper's is
            for crops of 224.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_count: int = 8
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.4)
    blur: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        _at_least(0, "crops.", self, "local_count")
        _at_least(1, "crops.", self, "local_size")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            rule = "must be two shares of the area, 0 < low <= high <= 1"
            require(0.0 < low <= high <= 1.0, f"crops.{name}", [low, high], rule)
        low, high = self.blur
        rule = "must be two deviations in pixels, 0 <= low <= high"
        require(0.0 <= low <= high, "crops.blur", [low, high], rule)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What student and teacher are compared by; see `training.loss`.

    Attributes:
        kind: "cross_entropy", or "mse" between L2-normalised outputs.
        centering: subtracts the centre from the teacher's outputs.
        assignment: how the teacher's outputs become distributions: "softmax" over the dimensions,
            "sinkhorn_knopp", or "batch_softmax".
        sinkhorn_iterations: of Sinkhorn-Knopp.
    """

    kind: str = "cross_entropy"
    centering: bool = True
    center_momentum: float = 0.9
    assignment: str = "softmax"
    sinkhorn_iterations: int = 3
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    warmup_teacher_temperature: float = 0.04
    warmup_teacher_epochs: int = 0

    def __post_init__(self) -> None:
        _one_of("loss.kind", self.kind, "cross_entropy", "mse")
        known = ("softmax", "sinkhorn_knopp", "batch_softmax")
        _one_of("loss.assignment", self.assignment, *known)
        for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
            value = getattr(self, name)
            require(value > 0.0, f"loss.{name}", value, "must be above 0")
        _at_least(0, "loss.", self, "warmup_teacher_epochs")
        _at_least(1, "loss.", self, "sinkhorn_iterations")
        value = self.center_momentum
        require(0.0 <= value <= 1.0, "loss.center_momentum", value, "must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What the teacher is made of.

    Attributes:
        kind: "ema"; or, for the paper's ablations, "student_copy", "previous_iteration",
            "previous_epoch".
        momentum: the EMA's at the first step; a cosine takes it to 1 at the last.
    """

    kind: str = "ema"
    momentum: float = 0.996

    def __post_init__(self) -> None:
        known = ("ema", "student_copy", "previous_iteration", "previous_epoch")
        _one_of("teacher.kind", self.kind, *known)
        rule = "must be from 0 to 1"
        require(0.0 <= self.momentum <= 1.0, "teacher.momentum", self.momentum, rule)


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
        _one_of("optimizer.name", self.name, "adamw", "sgd", "lars")
        require(self.lr > 0.0, "optimizer.lr", self.lr, "must be above 0")
        names = ("min_lr", "weight_decay", "weight_decay_end", "clip_grad", "warmup_epochs")
        _at_least(0, "optimizer.", self, *names, "freeze_last_layer_epochs")


@dataclass(frozen=True, kw_only=True)
class Knn:
    """The k-NN evaluation of student and teacher during a run.

    Attributes:
        train, val: class folders or tar files; leave both out for none.
        every_epochs: epochs between two evaluations.
        k: neighbours that vote.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    every_epochs: int = 1
    k: int = 20

    def __post_init__(self) -> None:
        rule = "knn.train and knn.val need each other"
        require(bool(self.train) == bool(self.val), "knn.val", list(self.val), rule)
        _at_least(1, "knn.", self, "every_epochs", "k")


@dataclass(frozen=True, kw_only=True)
class Report:
    """The run's page of curves and attention maps.

    Attributes:
        every_epochs: epochs between two versions of it; 0 draws it at the end alone.
        pictures: how many fixed pictures' attention maps are followed.
    """

    every_epochs: int = 1
    pictures: int = 6

    def __post_init__(self) -> None:
        _at_least(0, "report.", self, "every_epochs", "pictures")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run depends on.

    Attributes:
        run_dir: where logs and snapshots go; a run that finds its own snapshots there goes on.
        epochs: passes over the pictures.
        batch_size: pictures per process and forward.
        accumulation: forwards per optimizer step; EMA, centre and schedules move once a step.
        seed: of weights, order and crops; the crops of a picture depend on nothing else.
        device: "auto", "cuda" or "cpu".
        precision: "bf16" or "fp16" (autocast), "fp32", or "auto": bf16 where the device multiplies
            it natively (CUDA, and processors with AVX512-BF16 or AMX), else fp32.
        strategy: how processes share the work: "ddp", "fsdp" (parameters in shards), or "auto":
            fsdp for vit_large, else ddp.
        compile: compiles each block, and the device's augmentation, with torch.compile.
        cuda_graph: one GPU that trains a ViT with AdamW and a teacher by EMA takes each step as
            one CUDA graph.
        checkpoint_blocks: recomputes each block in the backward pass, for less memory.
        init_from: weights that a new run starts from: an artifact, a checkpoint, a known name or
            another run's folder; "" starts afresh.
        log_steps: steps between two lines of the log.
        snapshot_steps: steps between two snapshots.
        keep_snapshots: how many of the newest are kept.
        wandb_project: the Weights & Biases project to log to as well; "" for none.
    """

    data: Data
    run_dir: str = "runs/dino"
    epochs: int = 100
    batch_size: int = 64
    accumulation: int = 1
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    strategy: str = "auto"
    compile: bool = False
    cuda_graph: bool = True
    checkpoint_blocks: bool = False
    init_from: str = ""
    log_steps: int = 10
    snapshot_steps: int = 1000
    keep_snapshots: int = 2
    wandb_project: str = ""
    model: Model = field(default_factory=Model)
    head: Head = field(default_factory=Head)
    crops: Crops = field(default_factory=Crops)
    loss: Loss = field(default_factory=Loss)
    teacher: Teacher = field(default_factory=Teacher)
    optimizer: Optimizer = field(default_factory=Optimizer)
    knn: Knn = field(default_factory=Knn)
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulation", "log_steps", "snapshot_steps")
        _at_least(1, "", self, *counts, "keep_snapshots")
        _one_of("device", self.device, "auto", "cpu", "cuda")
        _one_of("precision", self.precision, "auto", "fp32", "bf16", "fp16")
        _one_of("strategy", self.strategy, "auto", "ddp", "fsdp")
        rule = "must be from 0 to 2**32 - 1"
        require(0 <= self.seed < 2**32, "seed", self.seed, rule)
        try:
            architecture = self.architecture
        except ValueError as error:
            raise ConfigError(f"model and crops.global_size: {error}") from error
        try:
            architecture.check_side("crops.local_size", self.crops.local_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        warmup = self.optimizer.warmup_epochs
        rule = f"must be fewer than epochs = {self.epochs}"
        require(warmup < self.epochs, "optimizer.warmup_epochs", warmup, rule)

    @property
    def architecture(self) -> Architecture:
        """The backbone that this recipe trains; its positions are those of the global crops."""
        return Architecture(
            name=self.model.architecture,
            patch_size=self.model.patch_size,
            image_size=self.crops.global_size,
            in_channels=self.data.channels,
        )


def load_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    count: Callable[[Recipe], int] | None = None,
    *,
    processes: int = 1,
    say: Callable[[str], object] | None = None,
) -> Recipe:
    """Reads a TOML file and those it is based on, then `key=value` overrides; see `tables`.

    Args:
        path: the file.
        overrides: see `training.tables.override`.
        count: the number of pictures of a recipe, which decides what "auto" becomes (see
            `training.auto`); asked where a value is "auto" alone.
        processes: that share a step, for the same.
        say: is told each such choice with its reason, a line each.

    Raises:
        ConfigError: a file that is missing or not TOML, an unknown key, an impossible value; an
            "auto" where it is not known, or without `count`.
    """
    table = read(path)
    for each in overrides:
        override(table, each)
    filled, keys = auto.stand_in(table)
    recipe = recipe_from_dict(filled)
    if not keys:
        return recipe
    if count is None:
        rule = "is chosen by the number of pictures, which is not known here; write a value"
        raise ConfigError(f"{keys[0]} = 'auto': {rule}")
    table, lines = auto.settle(table, recipe, pictures=count(recipe), processes=processes)
    if say is not None:
        for line in lines:
            say(line)
    return recipe_from_dict(table)


def recipe_from_dict(table: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping (TOML or JSON) tells; raises `ConfigError` as `load_recipe`."""
    return build(Recipe, {"data": {}, **table})


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """What `recipe_from_dict` reads back; plain values that JSON and TOML can hold."""
    return cast(dict[str, Any], plain(recipe))
