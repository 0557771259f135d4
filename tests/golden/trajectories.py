"""Six golden steps, on every path through the code; as a script, one process of several.

torchrun --nproc-per-node=N -m tests.golden.trajectories OPTIMIZER ddp|fsdp OUT.safetensors
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbone.vit import VisionTransformer
from tests.golden.conftest import Golden, golden_folder
from training.config import Data, Loss, Model, Optimizer, Recipe, Teacher
from training.dino import Network, ProjectionHead, make_teacher
from training.distributed import World, all_reduce_mean, world
from training.loss import DinoLoss
from training.optimizers import make_optimizer
from training.pretrain import train_step
from training.rates import rates_at
from training.sharding import shard, whole
from training.state import Training


def recipe_of(settings: dict[str, Any]) -> Recipe:
    names = ("min_lr", "warmup_epochs", "weight_decay", "weight_decay_end")
    names += ("clip_grad", "freeze_last_layer_epochs", "lr")
    return Recipe(
        data=Data(train=("unused",)),
        epochs=settings["epochs"],
        model=Model(),
        loss=Loss(
            teacher_temperature=settings["teacher_temp"],
            warmup_teacher_temperature=settings["warmup_teacher_temp"],
            warmup_teacher_epochs=settings["warmup_teacher_temp_epochs"],
        ),
        teacher=Teacher(momentum=settings["momentum_teacher"]),
        optimizer=Optimizer(name=settings["optimizer"], **{n: settings[n] for n in names}),
    )


def network_of(settings: dict[str, Any], state: dict[str, Tensor]) -> Network:
    backbone = VisionTransformer(
        **{name: settings[name] for name in ("image_size", "patch_size", "embed_dim", "depth")},
        num_heads=settings["num_heads"],
        drop_path_rate=settings["drop_path_rate"],
    )
    head = ProjectionHead(
        settings["embed_dim"],
        settings["out_dim"],
        hidden_dim=settings["hidden_dim"],
        bottleneck_dim=settings["bottleneck_dim"],
        norm_last_layer=settings["norm_last_layer"],
    )
    network = Network(backbone, head)
    network.load_state_dict(state)
    return network


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def six_steps(
    golden: Golden,
    optimizer: str,
    *,
    here: World | None = None,
    strategy: str = "",
    accumulation: int = 1,
    recompute: bool = False,
    compiled: bool = False,
    autocast: torch.dtype | None = None,
) -> tuple[list[float], Training]:
    """The golden steps' losses and what they led to, on this process's share of each batch."""
    here = here or World(0, 1, torch.device("cpu"))
    settings, tensors = golden[f"train_{optimizer}"], golden.tensors(f"train_{optimizer}")
    initial = part(tensors, "init.")
    student = network_of(settings, initial)
    teacher = make_teacher(student, network_of(settings, initial))
    student.backbone.recompute_blocks = recompute
    if compiled:
        for network in (student, teacher):
            for block in network.backbone.blocks:
                block.compile()
    parallel: nn.Module = student
    if strategy == "ddp":
        parallel = DistributedDataParallel(student)
    elif strategy == "fsdp":
        shard(student, here)
        shard(teacher, here)
    training = Training(
        student=student,
        parallel=parallel,
        teacher=teacher,
        loss=DinoLoss(settings["out_dim"]),
        optimizer=make_optimizer(optimizer, student),
        clip_grad=settings["clip_grad"],
        autocast=autocast,
    )
    recipe, losses = recipe_of(settings), []
    for step in range(settings["steps"]):
        crops = [*tensors[f"global_crops.{step}"], *tensors[f"local_crops.{step}"]]
        own = [crop.chunk(here.size)[here.rank].chunk(accumulation) for crop in crops]
        rates = rates_at(step, settings["steps_per_epoch"], recipe, batch=256)
        found = train_step(training, list(zip(*own, strict=True)), rates)
        losses.append(all_reduce_mean(found.terms.loss).item())
    return losses, training


def main(optimizer: str, strategy: str, out: str) -> None:
    torch.set_num_threads(1)
    golden = Golden(golden_folder())
    with world("cpu") as here:
        losses, training = six_steps(golden, optimizer, here=here, strategy=strategy)
        state = {"losses": torch.tensor(losses), "center": training.loss.center}
        for name in ("student", "teacher"):
            network = getattr(training, name)
            state |= {f"{name}.{k}": v for k, v in whole(network.state_dict()).items()}
        if here.is_main:
            save_file({k: v.contiguous().clone() for k, v in state.items()}, Path(out))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
