from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.training.conftest import TINY_RECIPE, write_pictures
from training import memory
from training.augmentations import normalise
from training.config import Recipe, recipe_from_dict
from training.data import MultiCropDataset
from training.dino import Network, make_teacher
from training.dry_run import crop_sheet, describe, schedule_table
from training.loss import DinoLoss
from training.pretrain import make_network, rates_at
from training.sources import open_pictures

SPE = 10  # steps an epoch


def recipe(**changes: Any) -> Recipe:
    table = {**TINY_RECIPE, "data": {"train": "x"}}
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe_from_dict(table)


def parts(of: Recipe, device: str) -> tuple[Network, Network, DinoLoss]:
    with torch.device(device):
        student = make_network(of, drop_path_rate=of.model.drop_path_rate)
        teacher = make_teacher(student, make_network(of, drop_path_rate=0.0))
        return student, teacher, DinoLoss(of.head.out_dim)


def rates(of: Recipe) -> Any:
    return lambda step: rates_at(step, SPE, of, batch=of.batch_size).logged()


def described(of: Recipe, processes: int = 1) -> str:
    student, teacher, loss = parts(of, "meta")
    return describe(
        of,
        student=student,
        teacher=teacher,
        loss=lambda s, t: loss(s, t, 0.04).loss,
        rates=rates(of),
        pictures=43,
        steps_per_epoch=SPE,
        processes=processes,
    )


def test_a_run_is_described() -> None:
    text = described(recipe(accumulation=3), processes=2)
    backbone = sum(p.numel() for p in parts(recipe(), "meta")[0].backbone.parameters())
    assert f"backbone {backbone / 1e6:.2f}M + head " in text
    assert "batch       24: 4 pictures x 2 process(es) x 3 forwards" in text
    assert "43 pictures, 10 steps an epoch, 4 epochs, 40 steps" in text
    assert "GiB a process" in text
    assert "DDP" in text


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


def measured(of: Recipe) -> int:
    """The most bytes that one real step on the CPU holds at once, as PyTorch's profiler counts."""
    student, teacher, loss = parts(of, "cpu")

    def step() -> None:
        crops = [torch.zeros(of.batch_size, 3, size, size) for size in sizes(of)]
        with torch.no_grad():
            target = teacher(crops[:2])
        loss(student(crops), target, 0.04).loss.backward()

    step()  # what is made once
    student.zero_grad()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    now = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def estimated(of: Recipe, **options: Any) -> memory.Memory:
    student, teacher, loss = parts(of, "meta")

    def forward() -> Tensor:
        with torch.device("meta"):
            crops = [torch.empty(of.batch_size, 3, size, size) for size in sizes(of)]
        with torch.no_grad():
            target = teacher(crops[:2])
        return loss(student(crops), target, 0.04).loss

    found = memory.estimate(student, teacher, forward, **options)
    assert all(p.grad is None for p in student.parameters())
    return found


@pytest.mark.parametrize(
    "of",
    [
        recipe(batch_size=6, crops={"global_size": 80, "local_size": 32}),
        recipe(batch_size=32, head={"out_dim": 8192}, crops={"local_count": 0}),
    ],
    ids=["tokens", "outputs"],
)
def test_the_memory_is_what_a_real_step_takes(of: Recipe) -> None:
    found = estimated(of, optimizer="adamw", autocast=None)
    assert found.step == pytest.approx(measured(of), rel=0.1)


def test_weights_states_and_precision_count() -> None:
    of = recipe(batch_size=64, crops={"global_size": 80, "local_size": 32})
    full = estimated(of, optimizer="adamw", autocast=None)
    half = estimated(of, optimizer="sgd", autocast=torch.bfloat16, processes=2)
    student = parts(of, "meta")[0]
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert full.weights == half.weights == 2 * 4 * sum(p.numel() for p in student.parameters())
    assert (full.optimizer, half.optimizer) == (2 * 4 * trained, 4 * trained)
    assert (full.buckets, half.buckets) == (0, 4 * trained)
    assert full.total == full.weights + full.optimizer + full.step
    assert 0.5 * full.step < half.step < 0.75 * full.step


def test_a_batch_of_crops_is_drawn(tmp_path: Path) -> None:
    of = recipe()
    write_pictures(tmp_path, 3)
    dataset = MultiCropDataset(open_pictures([tmp_path]), of.crops, seed=1)
    samples = [dataset[0, i] for i in range(3)]
    bytes_ = [torch.stack([s[part][n] for s in samples]) for part in (0, 1) for n in (0, 1)]
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
