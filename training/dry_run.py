"""What a run would be, without running it: size, memory, schedules, and a batch of crops."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from backbone.convnet import ParametersOnMeta
from training import memory
from training.config import Recipe
from training.distributed import World
from training.loss import TEACHER_CROPS, LossTerms
from training.precision import autocast_dtype, precision_name
from training.state import Training, make_training

_BORDER_PX = 6
_LABEL_PX = 16
_MIN_COLUMN_PX = 58  # a label's width


def describe(
    recipe: Recipe,
    here: World,
    rates: Callable[[int], Mapping[str, float]],
    *,
    pictures: int,
    steps_per_epoch: int,
) -> str:
    """Several lines: parameters, memory of each process, steps, and the schedules' values.

    Args:
        recipe: what is described.
        here: the process that would run it; nothing is put on its device.
        rates: step -> the schedules' values by name, such as `rates.Rates.logged()`.
        pictures: in the data set.
        steps_per_epoch: optimizer steps.

    Raises:
        ConfigError: what the recipe asks for does not exist.
    """
    nowhere = torch.device("meta")
    with nowhere if recipe.architecture.has_attention else ParametersOnMeta():
        alone = dataclasses.replace(recipe, compile=False)
        training = make_training(alone, World(0, 1, nowhere))
    need = memory.estimate(
        training.student,
        training.teacher,
        lambda: _loss(recipe, training),
        optimizer=recipe.optimizer.name,
        autocast=autocast_dtype(recipe.precision, here.device),
    )
    batch = recipe.batch_size * recipe.accumulation * here.size
    accumulated = f" x {recipe.accumulation} forwards" if recipe.accumulation > 1 else ""
    total = recipe.epochs * steps_per_epoch
    lines = [
        f"parameters  {_parameters(training.student)}",
        f"memory      {_gib(need.total)} a process: student and teacher {_gib(need.weights)}, "
        f"optimizer {_gib(need.optimizer)}, gradients and activations {_gib(need.step)} "
        "(an estimate; on CUDA leave a fifth above it)",
        f"batch       {batch}: {recipe.batch_size} pictures x {here.size} process(es)"
        f"{accumulated}, in {precision_name(autocast_dtype(recipe.precision, here.device))}",
        f"steps       {pictures} pictures, {steps_per_epoch} steps an epoch, "
        f"{recipe.epochs} epochs, {total} steps",
        "",
        schedule_table(recipe, rates, steps_per_epoch),
    ]
    return "\n".join(lines)


def schedule_table(
    recipe: Recipe, rates: Callable[[int], Mapping[str, float]], steps_per_epoch: int
) -> str:
    """The schedules at the start, where a warm-up ends, and at each quarter of the run."""
    total = recipe.epochs * steps_per_epoch
    marks = [
        (0, "start"),
        (total // 4, "25%"),
        (total // 2, "50%"),
        (3 * total // 4, "75%"),
        (total - 1, "end"),
        (round(recipe.optimizer.warmup_epochs * steps_per_epoch), "lr warmed up"),
        (recipe.loss.warmup_teacher_epochs * steps_per_epoch, "temperature warmed up"),
        (recipe.optimizer.freeze_last_layer_epochs * steps_per_epoch, "last layer free"),
    ]
    names = list(rates(0))
    rows = [["", "epoch", *names]]
    for step in sorted({step for step, _ in marks if step < total}):
        here = ", ".join(name for at, name in marks if at == step)
        values = rates(step)
        epoch = f"{step / steps_per_epoch:.4g}"
        rows.append([here, epoch, *(f"{values[name]:.4g}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def crop_sheet(
    crops: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], *, rows: int = 8
) -> Image.Image:
    """A picture of a batch as the networks see it: a row for each picture, a column for each crop.

    Args:
        crops: normalised, each [B, C, H, W], the two global ones first; drawn at their own size.
            Of 1 or 2 channels the first is drawn in grey, of 3 and more the first three.
        mean, std: of each channel on a scale of 0 to 1, by which the crops were normalised.
        rows: pictures that are drawn at most.
    """
    count = min(rows, len(crops[0]))
    widths = [max(crop.shape[-1], _MIN_COLUMN_PX) + _BORDER_PX for crop in crops]
    height = max(crop.shape[-2] for crop in crops) + _BORDER_PX
    size = (sum(widths) + _BORDER_PX, count * height + _BORDER_PX + _LABEL_PX)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    left = _BORDER_PX
    for i, (crop, width) in enumerate(zip(crops, widths, strict=True)):
        name = f"global {i + 1}" if i < 2 else f"local {i - 1}"
        draw.text((left, _BORDER_PX // 2), name, fill="black")
        for row, picture in enumerate(_pictures(crop[:count], mean, std)):
            sheet.paste(picture, (left, _LABEL_PX + _BORDER_PX + row * height))
        left += width
    return sheet


def _pictures(crop: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    channels = 3 if crop.shape[1] >= 3 else 1
    scale, shift = (torch.tensor(each[:channels]).reshape(-1, 1, 1) for each in (std, mean))
    values = crop[:, :channels].detach().float().cpu() * scale + shift
    pixels = values.mul(255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]


def _loss(recipe: Recipe, training: Training) -> Tensor:
    """The loss of one forward on tensors without data."""
    sizes = [recipe.crops.global_size] * TEACHER_CROPS
    sizes += [recipe.crops.local_size] * recipe.crops.local_count
    shape = (recipe.batch_size, recipe.data.channels)
    crops = [torch.empty(*shape, size, size, device="meta") for size in sizes]
    with torch.no_grad():
        target = training.teacher(crops[:TEACHER_CROPS])
    temperature = recipe.loss.teacher_temperature
    terms: LossTerms = training.loss(training.student(crops), target, temperature)
    return terms.loss


def _parameters(student: nn.Module) -> str:
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in student.named_children()
    }
    parts = " + ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items())
    return f"{sum(counts.values()) / 1e6:.2f}M: {parts}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
