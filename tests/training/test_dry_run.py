import dataclasses
import random
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.training.conftest import TINY_RECIPE, picture
from training import memory
from training.augmentations import multi_crop, normalise
from training.config import Recipe, recipe_from_dict
from training.distributed import World
from training.dry_run import crop_sheet, describe, schedule_table
from training.rates import rates_at
from training.state import Training, make_training

SPE = 10  # steps an epoch


def recipe(**changes: Any) -> Recipe:
    table = {**TINY_RECIPE, "data": {"train": "x"}}
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe_from_dict(table)


def made(of: Recipe, device: str) -> Training:
    with torch.device(device):
        return make_training(of, World(0, 1, torch.device(device)))


def rates(of: Recipe) -> Any:
    return lambda step: rates_at(step, SPE, of, batch=of.batch_size).logged()


def test_a_run_is_described() -> None:
    of = recipe(accumulation=3)
    here = World(0, 2, torch.device("cpu"))
    text = describe(of, here, rates(of), pictures=243, steps_per_epoch=SPE)
    backbone = sum(p.numel() for p in made(of, "meta").student.backbone.parameters())
    assert f"backbone {backbone / 1e6:.2f}M + head " in text
    assert "batch       24: 4 pictures x 2 process(es) x 3 forwards" in text
    assert "243 pictures, 10 steps an epoch, 4 epochs, 40 steps" in text
    assert "GiB a process" in text


def test_the_schedules_show_what_the_steps_will_have() -> None:
    of = recipe(
        loss={"teacher_temperature": 0.07, "warmup_teacher_epochs": 3},
        optimizer={"lr": 0.02, "warmup_epochs": 1.5, "freeze_last_layer_epochs": 2},
    )
    head, *rows = schedule_table(of, rates(of), SPE).splitlines()
    assert head.split() == ["epoch", *rates(of)(0)]
    marks = {
        "start": 0,
        "25%": 1,
        "lr warmed up": 1.5,
        "50%, last layer free": 2,
        "75%, temperature warmed up": 3,
        "end": 3.9,
    }
    assert [row[: row.index("  ")] for row in rows] == list(marks)
    assert [float(row.split()[-5]) for row in rows] == list(marks.values())
    assert float(rows[2].split()[-4]) == pytest.approx(0.02 * 4 / 256, rel=1e-3)
    assert [row.split()[-1] for row in rows[-2:]] == ["0.07", "0.07"]


def sizes(of: Recipe) -> list[int]:
    return [of.crops.global_size] * 2 + [of.crops.local_size] * of.crops.local_count


def forward(of: Recipe, training: Training, device: str) -> Tensor:
    crops = [torch.zeros(of.batch_size, 3, size, size, device=device) for size in sizes(of)]
    with torch.no_grad():
        target = training.teacher(crops[:2])
    return training.loss(training.student(crops), target, 0.04).loss


def measured(of: Recipe) -> int:
    """The most bytes that one real step on the CPU holds at once, as PyTorch's profiler counts."""
    training = made(of, "cpu")
    forward(of, training, "cpu").backward()  # what is made once
    training.student.zero_grad()
    activities = [torch.profiler.ProfilerActivity.CPU]
    options = {"profile_memory": True, "acc_events": True}  # without the second torch 2.11 warns
    with torch.profiler.profile(activities=activities, **options) as profile:
        forward(of, training, "cpu").backward()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    now = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def estimated(of: Recipe, **options: Any) -> memory.Memory:
    training = made(of, "meta")
    found = memory.estimate(
        training.student, training.teacher, lambda: forward(of, training, "meta"), **options
    )
    assert all(p.grad is None for p in training.student.parameters())
    return found


TOKENS = recipe(batch_size=6, crops={"global_size": 80, "local_size": 32})


@pytest.mark.parametrize(
    "of",
    [
        TOKENS,
        recipe(batch_size=32, head={"out_dim": 8192}, crops={"local_count": 0}),
        dataclasses.replace(TOKENS, checkpoint_blocks=True),
    ],
    ids=["tokens", "outputs", "recomputed"],
)
def test_the_memory_is_what_a_real_step_takes(of: Recipe) -> None:
    found = estimated(of, optimizer="adamw", autocast=None)
    assert found.step == pytest.approx(measured(of), rel=0.1)


def test_weights_states_and_precision_count() -> None:
    of = dataclasses.replace(TOKENS, batch_size=64)
    full = estimated(of, optimizer="adamw", autocast=None)
    half = estimated(of, optimizer="sgd", autocast=torch.bfloat16)
    student = made(of, "meta").student
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert full.weights == half.weights == 2 * 4 * sum(p.numel() for p in student.parameters())
    assert (full.optimizer, half.optimizer) == (2 * 4 * trained, 4 * trained)
    assert full.total == full.weights + full.optimizer + full.step
    assert 0.5 * full.step < half.step < 0.75 * full.step


def test_a_batch_of_crops_is_drawn() -> None:
    of = recipe()
    made = [multi_crop(picture(i), of.crops, random.Random(i)) for i in range(3)]
    bytes_ = [
        torch.stack([torch.from_numpy(crops[part][n]) for crops in made])
        for part in (0, 1)
        for n in (0, 1)
    ]
    mean, std = ((torch.tensor(x).reshape(-1, 1, 1)) for x in (of.data.mean, of.data.std))
    crops = [normalise(crop, mean, std) for crop in bytes_]
    sheet = crop_sheet(crops, of.data.mean, of.data.std, rows=2)
    assert sheet.size == (4 * (58 + 6) + 6, 2 * (16 + 6) + 6 + 16)
    for column, crop in enumerate(bytes_):
        for row in range(2):
            left, top = 6 + 64 * column, 22 + 22 * row
            side = crop.shape[-1]
            drawn = sheet.crop((left, top, left + side, top + side))
            assert drawn.tobytes() == Image.fromarray(crop[row].permute(1, 2, 0).numpy()).tobytes()


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_crops_of_other_channels_are_drawn(channels: int) -> None:
    crops = [torch.full((1, channels, 8, 8), 0.25) for _ in range(2)]
    sheet = crop_sheet(crops, [0.5] * channels, [0.4] * channels)
    assert sheet.getpixel((10, 26)) == (153, 153, 153)
