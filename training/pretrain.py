"""DINO pretraining (arXiv 2104.14294), from top to bottom as its Algorithm 1.

    python -m training.pretrain training/recipes/vit_small_16.toml data.train=my/pictures
    torchrun --nproc-per-node=8 -m training.pretrain RECIPE.toml run_dir=runs/a batch_size=64

Run the same command again to go on from the last snapshot in `run_dir`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training import data, snapshot
from training.bad_pictures import BadPictures
from training.config import ConfigError, Recipe, load_recipe, recipe_to_dict
from training.dino import clip_each_gradient, drop_last_layer_gradient, update_teacher
from training.distributed import World, all_gather_int, barrier, world
from training.loss import TEACHER_CROPS, LossTerms
from training.monitors import Monitor, TrainingDiverged
from training.optimizers import set_rates, skip_if
from training.pictures_on_device import PicturesOnDevice
from training.plan import Plan
from training.precision import autocast
from training.schedules import cosine, linear_warmup
from training.skipped import IN_A_ROW, IN_A_ROW_FP16, SkippedSteps
from training.sources import DataError
from training.state import Training, make_training, restore, state_of


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
    source = data.open_source(recipe.data, run_dir, here)
    plan = Plan(
        count=data.picture_count(source),
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        world=here,
        seed=recipe.seed,
    )
    stop = recipe.epochs * plan.steps_per_epoch

    torch.manual_seed(recipe.seed)  # the same weights on every rank
    found_snapshot = snapshot.latest(run_dir)
    fresh = found_snapshot is None
    training = make_training(recipe, here, initial=fresh and bool(recipe.init_from))
    scale = {"pictures": plan.count, "processes": here.size}
    start = 0
    if found_snapshot is not None:
        start, path = found_snapshot
        restore(training, snapshot.load(path, here.device), recipe=recipe, scale=scale)
    check_agreement(start, plan.count, here)

    if here.is_main:
        announce(recipe, here, training, pictures=plan.count, start=start, stop=stop)
    loader = data.crop_loader(
        source, plan, recipe.data, recipe.crops, start=start, stop=stop, device=here.device
    )
    bad = BadPictures(run_dir, here)
    if isinstance(source, PicturesOnDevice):
        bad.saw(source)
    limit = IN_A_ROW_FP16 if training.loss_scale else IN_A_ROW
    skipped = SkippedSteps(run_dir, here, in_a_row=limit)
    monitor = Monitor(
        run_dir,
        here,
        start=start,
        stop=stop,
        batch_size=plan.pictures_per_step,
        every=recipe.log_steps,
    )
    with monitor:
        batches = iter(loader)
        for step in range(start, stop):
            with monitor.waiting():
                loaded = list(islice(batches, plan.accumulation))
            for batch in loaded:
                bad.saw(batch)
            crops = [
                data.to_crops(batch, source, recipe.data, recipe.crops, here.device)
                for batch in loaded
            ]
            # Drop paths, the only chance in a step, are drawn anew from it: resuming is exact.
            torch.manual_seed((recipe.seed * 1_000_003 + step) * here.size + here.rank)
            epoch, place = divmod(step, plan.steps_per_epoch)
            rates = rates_at(step, plan.steps_per_epoch, recipe, batch=plan.pictures_per_step)
            found_terms = train_step(
                training, crops, rates, ends_epoch=place + 1 == plan.steps_per_epoch
            )
            skipped.saw(step, found_terms.skipped, [n for batch in loaded for n in batch.names])
            figures = {**found_terms.terms._asdict(), "gradient_norm": found_terms.gradient_norm}
            monitor.step(step, epoch, figures, rates.logged())
            if (step + 1) % recipe.snapshot_steps == 0 or step + 1 == stop:
                skipped.look()
                state = state_of(training, step=step + 1, recipe=recipe, scale=scale)
                if here.is_main:
                    snapshot.save(run_dir, step + 1, state)
                barrier()


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


class StepResult(NamedTuple):
    """What a step found, all scalars on the device.

    Attributes:
        terms: the loss's, as means over the step's batches.
        gradient_norm: over all gradients, before clipping.
        skipped: 1 where a gradient was not finite, so that nothing moved; else 0.
    """

    terms: LossTerms
    gradient_norm: Tensor
    skipped: Tensor


def train_step(
    training: Training,
    batches: Sequence[Sequence[Tensor]],
    rates: Rates,
    *,
    ends_epoch: bool = False,
) -> StepResult:
    """One step of Algorithm 1.

    Args:
        batches: one, or with gradient accumulation several, each a list of normalised crops
            [B, C, H, W], the two global ones first.
        ends_epoch: whether the step is its epoch's last.
    """
    student, teacher, optimizer = training.student, training.teacher, training.optimizer
    set_rates(optimizer, lr=rates.lr, weight_decay=rates.weight_decay)
    optimizer.zero_grad()
    terms: list[LossTerms] = []
    for i, crops in enumerate(batches):
        with training.without_sync(i + 1 < len(batches)):
            with autocast(crops[0].device, training.autocast):
                with torch.no_grad():
                    g_t = teacher(crops[:TEACHER_CROPS])
                g_s = training.parallel(crops)
            found = training.loss(g_s, g_t, rates.teacher_temperature)
            scale = training.loss_scale
            loss = found.loss / len(batches)
            (loss if scale is None else loss * scale.scale).backward()
        terms.append(found)

    norm = clip_each_gradient(
        student.parameters(), training.clip_grad, None if scale is None else scale.scale
    )
    skipped = (~norm.isfinite()).float()  # nothing below moves by such a step
    if rates.last_layer_frozen:
        drop_last_layer_gradient(student)
    if training.teacher_kind == "previous_iteration":
        update_teacher(teacher, student, 0.0)
    skip_if(optimizer, skipped)
    optimizer.step()
    if scale is not None:
        scale.update(skipped)
    if training.teacher_kind == "ema":
        update_teacher(teacher, student, rates.teacher_momentum)
    copies = training.teacher_kind == "student_copy"
    if copies or (training.teacher_kind == "previous_epoch" and ends_epoch):
        update_teacher(teacher, student, 0.0)
    training.loss.update_center(skipped)
    means = LossTerms(*(torch.stack(values).mean() for values in zip(*terms, strict=True)))
    return StepResult(means, norm, skipped)


def announce(
    recipe: Recipe, here: World, training: Training, *, pictures: int, start: int, stop: int
) -> None:
    """Writes the resolved recipe into the run's folder, and says what is about to happen."""
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe), indent=2) + "\n")
    weights = sum(p.numel() for p in training.student.parameters())
    patch = f"/{recipe.model.patch_size}" if recipe.architecture.has_attention else ""
    print(
        f"{recipe.model.architecture}{patch}, {weights / 1e6:.1f}M parameters "
        f"with the head; {pictures} pictures; {here.size} process(es) on {here.device.type}, "
        f"batch {recipe.batch_size} each; steps {start} to {stop}; run folder {run_dir}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
