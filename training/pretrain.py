"""DINO pretraining (arXiv 2104.14294), from top to bottom as its Algorithm 1.

    python -m training.pretrain training/recipes/vit_small_16.toml data.train=my/pictures
    torchrun --nproc-per-node=8 -m training.pretrain RECIPE.toml run_dir=runs/a batch_size=64

Run the same command again to go on from the last snapshot in `run_dir`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from training import data, resume, snapshot
from training.bad_pictures import BadPictures
from training.captured import CapturedStep, can_capture
from training.collapse import CollapseAlarm
from training.config import ConfigError, Recipe, load_recipe, recipe_to_dict
from training.dino import clip_each_gradient, drop_last_layer_gradient, update_teacher
from training.distributed import ProcessLost, World, all_gather_int, place, world
from training.dry_run import crop_sheet, describe
from training.environment import write_environment
from training.initial import load_initial
from training.loss import TEACHER_CROPS, DinoLoss, LossTerms
from training.monitors import Monitor, TrainingDiverged
from training.optimizers import take_step
from training.pictures_on_device import PicturesOnDevice
from training.plan import Plan
from training.precision import attention_kernel, autocast, precision_name
from training.rates import Rates, rates_at
from training.signals import StopRequest
from training.skipped import IN_A_ROW, IN_A_ROW_FP16, SkippedSteps
from training.sources import DataError
from training.state import Training, make_network, make_training, restore, state_of
from training.wandb_run import start_wandb
from training.watch import Watch
from training.workers import ending_workers

CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status.

    0 at the end of the run, 2 for a recipe or data that cannot be used, 1 where another process of
    the run is gone, and 128 + the signal's number for a run that was asked to stop and has written
    its snapshot.
    """
    parser = argparse.ArgumentParser(prog="python -m training.pretrain", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", type=Path, help="a TOML file, see training/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. epochs=10")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print sizes, memory and schedules, draw a batch of crops, and train nothing",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        where = place()
        recipe = load_recipe(
            options.recipe,
            options.overrides,
            lambda found: data.picture_count(
                data.open_source(
                    replace(found.data, on_device=False), Path(found.run_dir), World(0, 1, CPU)
                )
            ),
            processes=where.size,
            say=partial(print, file=sys.stderr) if where.rank == 0 else None,
        )
        with world(recipe.device) as here, ending_workers():
            if options.dry_run:
                dry_run(recipe, here)
                return 0
            status = pretrain(recipe, here)
            if here.is_main and status == 0:
                export = f"python -m training.export {recipe.run_dir} MODEL.safetensors"
                print(f"done: {recipe.run_dir}; next: {export}", file=sys.stderr)
            return status
    except (ConfigError, DataError, snapshot.SnapshotError, TrainingDiverged) as error:
        print(f"error: {data.one_line(error)}", file=sys.stderr)
        return 2
    except ProcessLost as error:
        again = "the same command goes on from the newest snapshot"
        print(f"error: {data.one_line(error)}; {again}", file=sys.stderr)
        return 1


def pretrain(recipe: Recipe, here: World) -> int:
    """One whole run, or what is left of it; returns the exit status, see `main`."""
    run_dir = Path(recipe.run_dir)
    source = data.open_source(recipe.data, run_dir, here)
    plan = make_plan(recipe, source, here)
    watch = Watch(recipe, here, data.at_random(source))
    stop = recipe.epochs * plan.steps_per_epoch

    found = resume.find(run_dir, here)
    torch.manual_seed(recipe.seed)  # the same weights on every rank
    training = make_training(recipe, here, initial=found is None and bool(recipe.init_from))
    scale = {"pictures": plan.count, "processes": here.size}
    start = 0
    if found is not None:
        start, state = found
        restore(training, state, recipe=recipe, scale=scale)
        del found, state
    check_agreement(plan.count, here)

    if here.is_main:
        announce(recipe, here, training, pictures=plan.count, start=start, stop=stop)
    if start == 0:
        watch.begins(training.teacher.backbone)
    bad = BadPictures(run_dir, here)
    if isinstance(source, PicturesOnDevice) and here.is_main:
        bad.saw(source)  # the same on every process
    in_a_row = IN_A_ROW_FP16 if training.loss_scale else IN_A_ROW
    skipped = SkippedSteps(run_dir, here, in_a_row=in_a_row, start=start)
    loader = data.crop_loader(
        source, plan, recipe.data, recipe.crops, start=start, stop=stop, device=here.device
    )
    monitor = make_monitor(recipe, here, plan, start=start, stop=stop)
    step_of: Callable[..., StepResult] = partial(train_step, training)
    if can_capture(recipe, here):
        step_of = CapturedStep(training, step_of)
    with StopRequest() as request, monitor:
        batches = iter(loader)
        for step in range(start, stop):
            epoch, place_in_epoch = divmod(step, plan.steps_per_epoch)
            ends_epoch = place_in_epoch + 1 == plan.steps_per_epoch
            with monitor.waiting():
                loaded = list(islice(batches, plan.accumulation))
            for batch in loaded:
                bad.saw(batch)
            crops = [
                data.to_crops(
                    batch, source, recipe.data, recipe.crops, here.device, compiled=recipe.compile
                )
                for batch in loaded
            ]
            # Drop paths, the only chance in a step, are drawn anew from it: resuming is exact.
            torch.manual_seed((recipe.seed * 1_000_003 + step) * here.size + here.rank)
            rates = rates_at(step, plan.steps_per_epoch, recipe, batch=plan.pictures_per_step)
            result = step_of(crops, rates, ends_epoch=ends_epoch)

            skipped.saw(step, result.skipped, [n for batch in loaded for n in batch.names])
            counts = {"skipped_steps": skipped.count, "bad_pictures": bad.count}
            monitor.step(step, epoch, result.figures(training.loss), rates.logged(), counts)
            last = step + 1 == stop
            wanted = request.wanted() and not last
            if ends_epoch:
                with monitor.pausing():
                    networks = {"student": training.student, "teacher": training.teacher}
                    scores = watch.epoch_ends(
                        step + 1, epoch, **{k: n.backbone for k, n in networks.items()}
                    )
                monitor.scalars(step + 1, scores)
            if last or wanted or (step + 1) % recipe.snapshot_steps == 0:
                skipped.look()
                state = state_of(training, step=step + 1, recipe=recipe, scale=scale)
                keep = recipe.keep_snapshots
                resume.save(run_dir, step + 1, state, here, keep=keep, must=last or wanted)
            if wanted:
                if here.is_main:
                    tqdm.write(
                        f"{request.name}: stopped after step {step + 1}, which is saved; "
                        "the same command goes on",
                        file=sys.stderr,
                    )
                return request.status
    return 0


def make_plan(recipe: Recipe, source: data.Source, here: World) -> Plan:
    """Which pictures each step takes; raises `DataError` where they do not fill one."""
    return Plan(
        count=data.picture_count(source),
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        world=here,
        seed=recipe.seed,
    )


def make_monitor(recipe: Recipe, here: World, plan: Plan, *, start: int, stop: int) -> Monitor:
    """The run's log, with an alarm for collapse."""
    run_dir = Path(recipe.run_dir)
    warmup_steps = round(recipe.optimizer.warmup_epochs * plan.steps_per_epoch)
    alarm = CollapseAlarm(recipe.head.out_dim, warmup_steps=warmup_steps, total_steps=stop)
    return Monitor(
        run_dir,
        here,
        start=start,
        stop=stop,
        batch_size=plan.pictures_per_step,
        every=recipe.log_steps,
        alarm=alarm if recipe.loss.kind == "cross_entropy" else None,
        wandb=start_wandb(recipe.wandb_project, run_dir, recipe_to_dict(recipe), here),
    )


def check_agreement(pictures: int, here: World) -> None:
    """Refuses to train where processes see different pictures.

    Raises:
        DataError: they do, on this process as on every other.
    """
    found = sorted(set(all_gather_int(pictures, here.device)))
    if len(found) > 1:
        raise DataError(
            f"the processes do not agree on the number of pictures: {found}; data.train must be "
            "the same on every node"
        )


def dry_run(recipe: Recipe, here: World) -> None:
    """Tells what a run would be, and draws its first batch as `crops.png` in the run's folder."""
    run_dir = Path(recipe.run_dir)
    source = data.open_source(recipe.data, run_dir, here)
    plan = make_plan(recipe, source, here)
    if recipe.init_from and resume.find(run_dir, here) is None and here.is_main:
        student = make_network(recipe, student=True)
        print(load_initial(recipe.init_from, student.backbone, student.head))
    loader = data.crop_loader(
        source, plan, recipe.data, recipe.crops, start=0, stop=1, device=here.device
    )
    batch = next(iter(loader))
    if not here.is_main:
        return
    per_epoch, whole = plan.steps_per_epoch, plan.pictures_per_step
    print(
        describe(
            recipe,
            here,
            lambda step: rates_at(step, per_epoch, recipe, batch=whole).logged(),
            pictures=plan.count,
            steps_per_epoch=per_epoch,
        )
    )
    crops = data.to_crops(batch, source, recipe.data, recipe.crops, here.device)
    run_dir.mkdir(parents=True, exist_ok=True)
    crop_sheet(crops, recipe.data.mean, recipe.data.std).save(run_dir / "crops.png")
    print(f"a batch of crops: {run_dir / 'crops.png'}")


class StepResult(NamedTuple):
    """What a step found, all scalars on the device.

    Attributes:
        terms: the loss's, as means over the step's batches.
        gradient_norm: over all gradients, before clipping.
        skipped: 1 where a gradient was not finite, so that student, optimizer, centre and
            BatchNorm's statistics stayed; else 0. The teacher's average goes on either way.
    """

    terms: LossTerms
    gradient_norm: Tensor
    skipped: Tensor

    def figures(self, loss: DinoLoss) -> dict[str, Tensor]:
        """What a log shows of it."""
        norms = {"gradient_norm": self.gradient_norm, "center_norm": loss.center.norm()}
        return {**self.terms._asdict(), **norms}


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
    statistics = [b for n in (student, teacher) for b in n.buffers() if b.is_floating_point()]
    before = [b.clone() for b in statistics]  # of BatchNorm; ViTs have none
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
            with attention_kernel(crops[0].device, training.autocast):
                (loss if scale is None else loss * scale.scale).backward()
        # What is kept of a step must not keep its graph: a captured step would refuse to follow.
        terms.append(LossTerms(*(each.detach() for each in found)))

    norm = clip_each_gradient(
        student.parameters(), training.clip_grad, None if scale is None else scale.scale
    )
    skipped = (~norm.isfinite()).float()
    for buffer, old in zip(statistics, before, strict=True):
        buffer.copy_(torch.where(skipped > 0, old, buffer))
    if rates.last_layer_frozen:
        drop_last_layer_gradient(student)
    if training.teacher_kind == "previous_iteration":
        update_teacher(teacher, student, 0.0)
    take_step(optimizer, skipped, lr=rates.lr, weight_decay=rates.weight_decay)
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
    write_environment(run_dir, here, start=start)
    weights = sum(p.numel() for p in training.student.parameters())
    patch = f"/{recipe.model.patch_size}" if recipe.architecture.has_attention else ""
    print(
        f"{recipe.model.architecture}{patch}, {weights / 1e6:.1f}M parameters "
        f"with the head; {pictures} pictures; {here.size} process(es) on {here.device.type}, "
        f"{precision_name(training.autocast)}, "
        f"batch {recipe.batch_size} each; steps {start} to {stop}; run folder {run_dir}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
