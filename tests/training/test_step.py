"""One step: the paper's teachers, a step that is not finite, fp16, and what is told of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.conftest import CPU, RATES, TINY_RECIPE
from training.config import ConfigError, recipe_from_dict
from training.monitors import TrainingDiverged
from training.precision import LossScale, autocast_dtype
from training.pretrain import train_step
from training.rates import Rates
from training.skipped import SkippedSteps
from training.state import Training, make_training


def training_of(**changes: Any) -> Training:
    torch.manual_seed(0)
    table = {**TINY_RECIPE, "data": {"train": "x"}}
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return make_training(recipe_from_dict(table), CPU)


def crops_of(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, side, side, generator=generator) for side in (16, 16, 8, 8)]


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def test_a_student_copy_is_the_student_after_each_step() -> None:
    training = training_of(teacher={"kind": "student_copy"})
    for seed in range(2):
        train_step(training, [crops_of(seed)], RATES)
        torch.testing.assert_close(weights(training.teacher), weights(training.student))


def test_the_previous_iterations_teacher_is_one_step_behind() -> None:
    training = training_of(teacher={"kind": "previous_iteration"})
    for seed in range(3):
        before = weights(training.student)
        train_step(training, [crops_of(seed)], RATES)
        torch.testing.assert_close(weights(training.teacher), before, rtol=0, atol=0)
    assert not torch.equal(
        weights(training.student)["backbone.cls_token"], before["backbone.cls_token"]
    )


def test_the_previous_epochs_teacher_moves_at_its_end() -> None:
    training = training_of(teacher={"kind": "previous_epoch"})
    start = weights(training.teacher)
    train_step(training, [crops_of(0)], RATES)
    torch.testing.assert_close(weights(training.teacher), start, rtol=0, atol=0)
    train_step(training, [crops_of(1)], RATES, ends_epoch=True)
    torch.testing.assert_close(weights(training.teacher), weights(training.student))


@pytest.mark.parametrize(
    "head",
    [
        {"predictor": True},
        {"predictor": True, "batch_norm": True, "activation": "relu"},
        {"bottleneck": False},
        {"bottleneck": False, "layers": 1},
        {"layers": 1},
        {"layers": 4},
    ],
    ids=str,
)
def test_every_head_learns_and_freezes(head: dict[str, Any]) -> None:
    training = training_of(head=head)
    last = [p.detach().clone() for p in training.student.head.last_parameters()]
    start = weights(training.student)
    train_step(training, [crops_of(0)], RATES)
    assert training.teacher.head.predictor is None
    assert all(p.grad is not None for p in training.student.parameters() if p.requires_grad)
    name = "head.mlp.weight" if head.get("layers") == 1 else "head.mlp.0.weight"
    assert not torch.equal(weights(training.student)[name], start[name])
    training = training_of(head=head)
    frozen = Rates(**{**RATES.__dict__, "last_layer_frozen": True})
    train_step(training, [crops_of(0)], frozen)
    for before, after in zip(last, training.student.head.last_parameters(), strict=True):
        torch.testing.assert_close(after.detach(), before, rtol=0, atol=0)


def test_a_predictor_without_a_bottleneck_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"head\.predictor"):
        training_of(head={"predictor": True, "bottleneck": False})


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_step_that_is_not_finite_is_no_step(name: str, first: bool) -> None:
    """Neither student nor optimizer nor centre: the next step is what it would have been.

    The teacher's average, which goes on towards the student, is held still here.
    """
    bad = crops_of(1)
    bad[1][2, 0, 3, 3] = torch.nan
    batches = [bad, crops_of(2)] if first else [crops_of(0), bad, crops_of(2)]
    frozen_teacher = Rates(**{**RATES.__dict__, "teacher_momentum": 1.0})
    results = []
    for chosen in (batches, [batch for batch in batches if batch is not bad]):
        training = training_of(optimizer={"name": name, "lr": 0.02})
        skipped = [train_step(training, [b], frozen_teacher).skipped.item() for b in chosen]
        assert skipped == [float(batch is bad) for batch in chosen]
        results.append((weights(training.student), training.loss.center.clone()))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert bool(results[0][1].any())


def test_auto_is_bf16_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for found, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, None),
        ({}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert autocast_dtype("auto", cpu) is expected
        assert autocast_dtype("auto", cuda) is torch.bfloat16
        assert autocast_dtype("fp32", cpu) is None


def test_fp16_scales_the_loss_and_stays_near_fp32() -> None:
    losses = {}
    for precision in ("fp32", "fp16"):
        training = training_of(precision=precision)
        if training.loss_scale is not None:
            training.loss_scale.scale.fill_(8.0)  # so tiny a network has large gradients
        losses[precision] = [
            train_step(training, [crops_of(seed)], RATES).terms.loss.item() for seed in range(3)
        ]
        assert (training.loss_scale is not None) == (precision == "fp16")
    # Processors that compute in fp16 themselves round more: 1.1% after two steps.
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.03)


def test_fp16_gradients_are_those_of_fp32() -> None:
    norms = {}
    for precision in ("fp32", "fp16"):
        training = training_of(precision=precision, optimizer={"clip_grad": 0.0})
        if training.loss_scale is not None:
            training.loss_scale.scale.fill_(8.0)
        norms[precision] = train_step(training, [crops_of(0)], RATES).gradient_norm.item()
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)


def test_the_loss_scale_halves_and_doubles() -> None:
    scale = LossScale(initial=8.0, interval=2)
    for found_inf, expected in (
        (1.0, 4.0),
        (0.0, 4.0),
        (0.0, 8.0),
        (0.0, 8.0),
        (0.0, 16.0),
        (1.0, 8.0),
    ):
        scale.update(torch.tensor(found_inf))
        assert scale.scale.item() == expected


def test_an_infinite_gradient_in_fp16_halves_the_scale_and_is_skipped() -> None:
    training = training_of(precision="fp16")
    assert training.loss_scale is not None
    training.loss_scale.scale.fill_(2.0**40)
    before = weights(training.student)
    assert train_step(training, [crops_of(0)], RATES).skipped == 1.0
    assert training.loss_scale.scale == 2.0**39
    torch.testing.assert_close(weights(training.student), before, rtol=0, atol=0)


def test_skipped_steps_are_counted_and_named(tmp_path: Path) -> None:
    skipped = SkippedSteps(tmp_path, CPU, in_a_row=3)
    for step, flag in enumerate([0.0, 1.0, 1.0, 0.0, 1.0]):
        skipped.saw(step, torch.tensor(flag), [f"{step}a.jpg", f"{step}b.jpg"])
    assert skipped.count == 2  # the last one is not looked at yet
    skipped.look()
    assert skipped.count == 3
    lines = (tmp_path / "skipped_steps.rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 5]
    assert json.loads(lines[0])["names"] == ["1a.jpg", "1b.jpg"]


def test_several_in_a_row_stop_the_run_with_advice(tmp_path: Path) -> None:
    skipped = SkippedSteps(tmp_path, CPU, in_a_row=3)
    for step in range(3):
        skipped.saw(step, torch.tensor(1.0), ["x.jpg"])
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row.*step 3.*optimizer\.lr"):
        skipped.saw(3, torch.tensor(0.0), ["y.jpg"])


def test_going_on_keeps_the_count_and_drops_what_is_done_again(tmp_path: Path) -> None:
    skipped = SkippedSteps(tmp_path, CPU, in_a_row=9)
    for step in (2, 4, 7):
        skipped.saw(step, torch.tensor(1.0), [f"{step}.jpg"])
    skipped.look()
    path = tmp_path / "skipped_steps.rank0.jsonl"
    with path.open("a") as file:
        file.write('{"step": 9, "na')  # cut short
    again = SkippedSteps(tmp_path, CPU, in_a_row=9, start=5)
    assert again.count == 2
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 5]


def test_a_skipped_step_leaves_batch_norms_statistics_alone() -> None:
    training = training_of(head={"batch_norm": True})
    bad = crops_of(1)
    bad[0][0, 0, 0, 0] = torch.inf
    train_step(training, [crops_of(0)], RATES)
    networks = (training.student, training.teacher)
    before = [b.clone() for network in networks for b in network.buffers()]
    assert train_step(training, [bad], RATES).skipped == 1.0
    after = [b for network in networks for b in network.buffers()]
    floats = [(b, a) for b, a in zip(before, after, strict=True) if a.is_floating_point()]
    assert floats
    for old, new in floats:
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_blocks_are_recomputed_in_bf16_too() -> None:
    norms = []
    for recompute in (False, True):
        training = training_of(precision="bf16", checkpoint_blocks=recompute)
        norms.append(train_step(training, [crops_of(0)], RATES).gradient_norm)
    torch.testing.assert_close(*norms, rtol=1e-2, atol=0)
