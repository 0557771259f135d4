"""DINO pretraining (arXiv 2104.14294), from top to bottom as its Algorithm 1.

    python -m training.pretrain training/recipes/vit_small_16.toml data.train=my/pictures
    torchrun --nproc-per-node=8 -m training.pretrain RECIPE.toml run_dir=runs/a batch_size=64

Run the same command again to go on from the last snapshot in `run_dir`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbone.preprocess import IMAGENET_MEAN, IMAGENET_STD
from training import data, snapshot
from training.augmentations import normalise
from training.config import ConfigError, Recipe, load_recipe, recipe_to_dict
from training.dino import (
    Network,
    ProjectionHead,
    clip_each_gradient,
    drop_last_layer_gradient,
    make_teacher,
    update_teacher,
)
from training.distributed import World, all_gather_int, barrier, world
from training.loss import DinoLoss, LossTerms
from training.monitors import Monitor, TrainingDiverged, check_finite
from training.optimizers import make_optimizer, set_rates
from training.precision import autocast, autocast_dtype
from training.schedules import cosine, linear_warmup
from training.sources import DataError, open_pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a recipe or data that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m training.pretrain", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", type=Path, help="a TOML file, see training/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. epochs=10")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        with world(recipe.device) as here:
            pretrain(recipe, here)
    except (ConfigError, DataError, snapshot.SnapshotError, TrainingDiverged) as error:
        print(f"error: {data.one_line(error)}", file=sys.stderr)
        return 2
    return 0


def pretrain(recipe: Recipe, here: World) -> None:
    """One whole run, or what is left of it."""
    run_dir = Path(recipe.run_dir)
    pictures = open_pictures(recipe.data.train)
    steps_per_epoch = data.steps_per_epoch(len(pictures.names), recipe.batch_size, here)
    stop = recipe.epochs * steps_per_epoch

    torch.manual_seed(recipe.seed)  # the same weights on every rank
    training = make_training(recipe, here)
    scale = {"pictures": len(pictures.names), "processes": here.size}
    start = resume(run_dir, recipe, scale, training, here)
    check_agreement(start, len(pictures.names), here)

    sampler = data.RunSampler(
        len(pictures.names),
        batch_size=recipe.batch_size,
        world=here,
        seed=recipe.seed,
        start=start,
        stop=stop,
    )
    dataset = data.MultiCropDataset(pictures, recipe.crops, seed=recipe.seed)
    on_gpu = here.device.type == "cuda"
    loader = data.crop_loader(dataset, sampler, workers=recipe.data.workers, pin_memory=on_gpu)
    if here.is_main:
        announce(recipe, here, training, pictures=len(pictures.names), start=start, stop=stop)
    monitor = Monitor(
        run_dir,
        here,
        start=start,
        stop=stop,
        batch_size=recipe.batch_size * here.size,
        every=recipe.log_steps,
    )
    mean, std = (
        torch.tensor(values, device=here.device).reshape(-1, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )

    with monitor:
        batches = iter(loader)
        for step in range(start, stop):
            with monitor.waiting():
                batch = next(batches)
            crops = [
                normalise(crop.to(here.device, non_blocking=True), mean, std)
                for part in batch
                for crop in part
            ]
            # Drop paths, the only chance in a step, are drawn anew from it: resuming is exact.
            torch.manual_seed((recipe.seed * 1_000_003 + step) * here.size + here.rank)
            rates = rates_at(step, steps_per_epoch, recipe, batch=recipe.batch_size * here.size)
            terms, gradient_norm = train_step(training, crops, rates)
            figures = {**terms._asdict(), "gradient_norm": gradient_norm}
            monitor.step(step, step // steps_per_epoch, figures, rates.logged())
            if (step + 1) % recipe.snapshot_steps == 0 or step + 1 == stop:
                check_finite(terms.loss, step)
                save(run_dir, step + 1, recipe, scale, training, here)


def check_agreement(start: int, pictures: int, here: World) -> None:
    """Refuses to train where processes see different snapshots or pictures.

    Raises:
        SnapshotError: they do, on this process as on every other.
    """
    for what, value in (("steps done", start), ("pictures", pictures)):
        found = sorted(set(all_gather_int(value, here.device)))
        if len(found) > 1:
            raise snapshot.SnapshotError(
                f"the processes do not agree on the {what}: {found}; run_dir and the pictures "
                "must be the same on every node"
            )


@dataclass(frozen=True)
class Rates:
    """What the schedules say for one step; see `rates_at`."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    last_layer_frozen: bool

    def logged(self) -> dict[str, float]:
        """The rates that a log shows."""
        return {k: v for k, v in asdict(self).items() if k != "last_layer_frozen"}


def rates_at(step: int, steps_per_epoch: int, recipe: Recipe, *, batch: int) -> Rates:
    """The rates of a step; the learning rate is scaled linearly with the whole `batch` / 256."""
    optimizer, loss = recipe.optimizer, recipe.loss
    total = recipe.epochs * steps_per_epoch
    epoch = step // steps_per_epoch
    return Rates(
        lr=cosine(
            step,
            base=optimizer.lr * batch / 256,
            final=optimizer.min_lr,
            total_steps=total,
            warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch),
        ),
        weight_decay=cosine(
            step,
            base=optimizer.weight_decay,
            final=optimizer.weight_decay_end,
            total_steps=total,
        ),
        teacher_momentum=cosine(step, base=recipe.teacher.momentum, final=1.0, total_steps=total),
        teacher_temperature=linear_warmup(
            epoch,
            start=loss.warmup_teacher_temperature,
            end=loss.teacher_temperature,
            warmup_epochs=loss.warmup_teacher_epochs,
        ),
        last_layer_frozen=epoch < optimizer.freeze_last_layer_epochs,
    )


@dataclass
class Training:
    """All that moves in a run.

    `student` is the plain network; `parallel` is what is called, the same or wrapped in DDP.
    """

    student: Network
    parallel: nn.Module
    teacher: Network
    loss: DinoLoss
    optimizer: torch.optim.Optimizer
    clip_grad: float
    autocast: torch.dtype | None


def make_training(recipe: Recipe, here: World) -> Training:
    """Student and teacher (equal at the start), loss and optimizer, on this process's device."""
    student = make_network(recipe, drop_path_rate=recipe.model.drop_path_rate).to(here.device)
    teacher = make_teacher(student, make_network(recipe, drop_path_rate=0.0).to(here.device))
    parallel: nn.Module = student
    if here.size > 1:
        if recipe.head.batch_norm:
            if here.device.type != "cuda":
                raise ConfigError(
                    "head.batch_norm = true: batch statistics over several processes exist on "
                    "CUDA alone; use one process, or leave it out"
                )
            convert = cast(Callable[[nn.Module], Network], nn.SyncBatchNorm.convert_sync_batchnorm)
            student, teacher = convert(student), convert(teacher)
        parallel = DistributedDataParallel(
            student, device_ids=[here.device] if here.device.type == "cuda" else None
        )
    loss = DinoLoss(
        recipe.head.out_dim,
        student_temperature=recipe.loss.student_temperature,
        center_momentum=recipe.loss.center_momentum,
    ).to(here.device)
    return Training(
        student=student,
        parallel=parallel,
        teacher=teacher,
        loss=loss,
        optimizer=make_optimizer(recipe.optimizer.name, student),
        clip_grad=recipe.optimizer.clip_grad,
        autocast=autocast_dtype(recipe.precision, here.device),
    )


def make_network(recipe: Recipe, *, drop_path_rate: float) -> Network:
    """Backbone and head as the recipe says."""
    backbone = recipe.architecture.build(drop_path_rate=drop_path_rate)
    settings = asdict(recipe.head)
    head = ProjectionHead(backbone.embed_dim, settings.pop("out_dim"), **settings)
    return Network(backbone, head)


def train_step(
    training: Training, crops: Sequence[Tensor], rates: Rates
) -> tuple[LossTerms, Tensor]:
    """One step of Algorithm 1 on normalised crops, each [B, C, H, W], the two global ones first.

    Returns the loss's terms and the gradient's norm before clipping, all scalars on the device.
    """
    set_rates(training.optimizer, lr=rates.lr, weight_decay=rates.weight_decay)
    with autocast(crops[0].device, training.autocast):
        with torch.no_grad():
            teacher = training.teacher(crops[:2])
        student = training.parallel(crops)
    terms = training.loss(student, teacher, rates.teacher_temperature)

    training.optimizer.zero_grad()
    terms.loss.backward()
    gradient_norm = clip_each_gradient(training.student.parameters(), training.clip_grad)
    if rates.last_layer_frozen:
        drop_last_layer_gradient(training.student)
    training.optimizer.step()
    update_teacher(training.teacher, training.student, rates.teacher_momentum)
    return terms, gradient_norm


def save(
    run_dir: Path,
    step: int,
    recipe: Recipe,
    scale: Mapping[str, int],
    training: Training,
    here: World,
) -> None:
    """Writes the snapshot after `step` steps; every rank waits until it is on disk."""
    if here.is_main:
        state = {
            "step": step,
            "recipe": recipe_to_dict(recipe),
            "scale": dict(scale),
            "student": training.student.state_dict(),
            "teacher": training.teacher.state_dict(),
            "loss": training.loss.state_dict(),
            "optimizer": training.optimizer.state_dict(),
        }
        snapshot.save(run_dir, step, state)
    barrier()


def resume(
    run_dir: Path, recipe: Recipe, scale: Mapping[str, int], training: Training, here: World
) -> int:
    """Restores the newest snapshot into `training`; returns the steps done, 0 for a new run.

    Args:
        scale: the numbers of pictures and processes, on which order and schedules depend.

    Raises:
        SnapshotError: it was made by another recipe, or at another scale.
    """
    found = snapshot.latest(run_dir)
    if found is None:
        return 0
    state = snapshot.load(found[1], here.device)
    old = {**state["recipe"], **state.get("scale", scale)}
    if changed := _changed(old, {**recipe_to_dict(recipe), **scale}):
        raise snapshot.SnapshotError(
            f"{run_dir} holds a run of another recipe: {'; '.join(changed)}; "
            "take the old values, or another run_dir"
        )
    training.student.load_state_dict(state["student"])
    training.teacher.load_state_dict(state["teacher"])
    training.loss.load_state_dict(state["loss"])
    training.optimizer.load_state_dict(state["optimizer"])
    return found[0]


_MAY_CHANGE = frozenset({"device", "log_steps", "run_dir", "snapshot_steps", "data.workers"})


def _changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _changed(a, b, f"{name}.")
        elif a != b and name not in _MAY_CHANGE:
            found.append(f"{name} was {json.dumps(a)} and is {json.dumps(b)}")
    return found


def announce(
    recipe: Recipe, here: World, training: Training, *, pictures: int, start: int, stop: int
) -> None:
    """Writes the resolved recipe into the run's folder, and says what is about to happen."""
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe), indent=2) + "\n")
    weights = sum(p.numel() for p in training.student.parameters())
    print(
        f"{recipe.model.architecture}/{recipe.model.patch_size}, {weights / 1e6:.1f}M parameters "
        f"with the head; {pictures} pictures; {here.size} process(es) on {here.device.type}, "
        f"batch {recipe.batch_size} each; steps {start} to {stop}; run folder {run_dir}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
