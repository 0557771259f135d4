"""All that moves in a run: how it is made from a recipe, and how it goes to disk and back."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from backbone.vit import VisionTransformer
from training import snapshot
from training.config import ConfigError, Recipe, recipe_from_dict, recipe_to_dict
from training.dino import Network, ProjectionHead, make_teacher
from training.distributed import World
from training.initial import load_initial
from training.loss import DinoLoss
from training.optimizers import make_optimizer
from training.precision import LossScale, autocast_dtype
from training.sharding import load_optimizer, load_weights, shard, whole


@dataclass
class Training:
    """Student and teacher, loss and optimizer.

    `student` is the plain network; `parallel` is what is called: the same, or wrapped in DDP.
    `loss_scale` is None but for fp16.
    """

    student: Network
    parallel: nn.Module
    teacher: Network
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    clip_grad: float
    autocast: torch.dtype | None
    loss_scale: LossScale | None = None
    teacher_kind: str = "ema"

    @contextmanager
    def without_sync(self, active: bool) -> Iterator[None]:
        """Inside, if `active`, gradients are summed up on each process and not yet exchanged."""
        if active and isinstance(self.parallel, DistributedDataParallel):
            with self.parallel.no_sync():
                yield
            return
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(not active)
        yield


def make_training(recipe: Recipe, here: World, *, initial: bool = False) -> Training:
    """Student and teacher (equal at the start), loss and optimizer, on this process's device.

    Args:
        initial: starts from the weights that `init_from` names.

    Raises:
        ConfigError: what the recipe asks for does not exist on this device or with this many
            processes.
    """
    student = make_network(recipe, student=True)
    if initial:
        taken = load_initial(recipe.init_from, student.backbone, student.head)
        if here.is_main:
            print(taken, file=sys.stderr)
    student = student.to(here.device)
    teacher = make_teacher(student, make_network(recipe, student=False).to(here.device))
    if here.size > 1 and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules()
    ):
        if here.device.type != "cuda":
            raise ConfigError(
                f"model.architecture = {recipe.model.architecture!r}, head.batch_norm = "
                f"{recipe.head.batch_norm}: batch statistics over several processes exist on "
                "CUDA alone; use one process, or a network without BatchNorm"
            )
        convert = cast(Any, nn.SyncBatchNorm.convert_sync_batchnorm)
        student, teacher = convert(student), convert(teacher)
    backbone = student.backbone
    if recipe.checkpoint_blocks:
        if not isinstance(backbone, VisionTransformer):
            raise ConfigError("checkpoint_blocks = True: only ViTs have blocks to recompute")
        backbone.recompute_blocks = True
    if recipe.compile:
        if isinstance(backbone, VisionTransformer):
            backbone.fixed_shapes = True
        for network in (student, teacher):
            for part in getattr(network.backbone, "blocks", [network.backbone]):
                part.compile(dynamic=False)
    parallel: nn.Module = student
    if here.size > 1 and _sharded(recipe):
        shard(student, here)
        shard(teacher, here)
    elif here.size > 1:
        parallel = DistributedDataParallel(
            student,
            device_ids=[here.device] if here.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    dtype = autocast_dtype(recipe.precision, here.device)
    settings = asdict(recipe.loss)
    names = ("teacher_temperature", "warmup_teacher_temperature", "warmup_teacher_epochs")
    loss = DinoLoss(
        recipe.head.out_dim, **{k: v for k, v in settings.items() if k not in names}
    ).to(here.device)
    return Training(
        student=student,
        parallel=parallel,
        teacher=teacher,
        loss=loss,
        optimizer=make_optimizer(recipe.optimizer.name, student),
        clip_grad=recipe.optimizer.clip_grad,
        autocast=dtype,
        loss_scale=LossScale().to(here.device) if dtype == torch.float16 else None,
        teacher_kind=recipe.teacher.kind,
    )


def make_network(recipe: Recipe, *, student: bool) -> Network:
    """Backbone and head as the recipe says; drop paths and the predictor are the student's."""
    rate = recipe.model.drop_path_rate if student else 0.0
    backbone = recipe.architecture.build(drop_path_rate=rate)
    settings = asdict(recipe.head)
    settings["predictor"] = student and recipe.head.predictor
    head = ProjectionHead(backbone.embed_dim, settings.pop("out_dim"), **settings)
    return Network(backbone, head)


def _sharded(recipe: Recipe) -> bool:
    wanted = recipe.strategy
    if wanted == "auto":
        wanted = "fsdp" if recipe.model.architecture == "vit_large" else "ddp"
    if wanted == "fsdp" and recipe.optimizer.name != "adamw":
        raise ConfigError(
            f"optimizer.name = {recipe.optimizer.name!r}: only adamw works on shards; take "
            "strategy = 'ddp'"
        )
    if wanted == "fsdp" and not recipe.model.architecture.startswith("vit_"):
        raise ConfigError(
            f"model.architecture = {recipe.model.architecture!r}: only ViTs are sharded; take "
            "strategy = 'ddp'"
        )
    return wanted == "fsdp"


def state_of(
    training: Training, *, step: int, recipe: Recipe, scale: Mapping[str, int]
) -> dict[str, Any]:
    """Everything that going on needs, whole and on the CPU where it was in shards.

    Every process must call it. Order, crops and drop paths follow from the seed and the step.
    """
    scaler = training.loss_scale
    return {
        "step": step,
        "recipe": recipe_to_dict(recipe),
        "scale": dict(scale),
        "student": whole(training.student.state_dict()),
        "teacher": whole(training.teacher.state_dict()),
        "loss": training.loss.state_dict(),
        "optimizer": whole(training.optimizer.state_dict()),
        "loss_scale": {} if scaler is None else scaler.state_dict(),
    }


def restore(
    training: Training, state: Mapping[str, Any], *, recipe: Recipe, scale: Mapping[str, int]
) -> None:
    """Puts back what `state_of` told.

    Args:
        scale: the numbers of pictures and processes, on which order and schedules depend.

    Raises:
        SnapshotError: it was made by another recipe, or at another scale.
    """
    # A snapshot of an older version lacks what recipes have learned since: defaults, then.
    try:
        told = recipe_to_dict(recipe_from_dict(state["recipe"]))
    except ConfigError as error:
        raise snapshot.SnapshotError(
            f"{recipe.run_dir} holds a run whose recipe this version does not know: {error}; "
            "take another run_dir"
        ) from error
    old = {**told, **state.get("scale", scale)}
    free = _MAY_CHANGE - ({"data.workers"} if recipe.data.stream else set())
    if changed := _changed(old, {**recipe_to_dict(recipe), **scale}, free):
        raise snapshot.SnapshotError(
            f"{recipe.run_dir} holds a run of another recipe: {'; '.join(changed)}; "
            "take the old values, or another run_dir"
        )
    load_weights(training.student, state["student"])
    load_weights(training.teacher, state["teacher"])
    training.loss.load_state_dict(state["loss"])
    load_optimizer(training.optimizer, state["optimizer"])
    if training.loss_scale is not None:
        training.loss_scale.load_state_dict(state["loss_scale"])


_MAY_CHANGE = frozenset(
    {
        "checkpoint_blocks",
        "compile",
        "cuda_graph",
        "data.augment",
        "data.on_device",
        "data.workers",
        "device",
        "init_from",
        "keep_snapshots",
        "knn",
        "log_steps",
        "report",
        "run_dir",
        "snapshot_steps",
        "strategy",
        "wandb_project",
    }
)


def _changed(
    old: dict[str, Any], new: dict[str, Any], free: frozenset[str], prefix: str = ""
) -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if name in free:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += _changed(a, b, free, f"{name}.")
        elif a != b:
            found.append(f"{name} was {json.dumps(a)} and is {json.dumps(b)}")
    return found
