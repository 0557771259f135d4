"""A step as a CUDA graph does what the same step does kernel by kernel."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.training.conftest import RATES, TINY_RECIPE
from training.captured import CapturedStep, can_capture
from training.config import recipe_from_dict
from training.distributed import World
from training.pretrain import StepResult, train_step
from training.state import Training, make_training, state_of

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_what_can_be_captured() -> None:
    table = {**TINY_RECIPE, "data": {"train": "x"}}
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert can_capture(recipe_from_dict(table), World(0, 1, gpu))
    assert not can_capture(recipe_from_dict(table), World(0, 1, cpu))
    assert not can_capture(recipe_from_dict(table), World(0, 2, gpu))
    for change in (
        {"cuda_graph": False},
        {"optimizer": {**TINY_RECIPE["optimizer"], "name": "sgd"}},
        {"teacher": {"kind": "student_copy"}},
        {"model": {"architecture": "resnet18"}, "crops": {"global_size": 32, "local_size": 32}},
    ):
        assert not can_capture(recipe_from_dict({**table, **change}), World(0, 1, gpu))


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_captured_step_is_the_same_step(precision: str, accumulation: int) -> None:
    """Losses, networks and centre, with stochastic depth, and a last layer that thaws."""
    here = World(0, 1, torch.device("cuda", 0))
    model = {**TINY_RECIPE["model"], "drop_path_rate": 0.3}
    table = {**TINY_RECIPE, "data": {"train": "x"}, "precision": precision, "model": model}
    recipe = recipe_from_dict({**table, "device": "cuda"})

    def run(captured: bool) -> tuple[Training, list[float]]:
        torch.manual_seed(0)
        training = make_training(recipe, here)
        step = partial(train_step, training)
        one = CapturedStep[StepResult](training, step) if captured else step
        losses = []
        for i in range(14):
            generator = torch.Generator().manual_seed(i)
            batches: list[list[Tensor]] = [
                [
                    torch.randn(4, 3, side, side, generator=generator).cuda()
                    for side in (16, 16, 8, 8, 8)
                ]
                for _ in range(accumulation)
            ]
            rates = dataclasses.replace(
                RATES,
                lr=1e-3 / (i + 1),
                weight_decay=0.04 * (i + 1),
                teacher_momentum=0.9 + i / 200,
                teacher_temperature=0.04 + i / 500,
                last_layer_frozen=i < 6,
            )
            torch.manual_seed(100 + i)
            result = one(batches, rates)
            assert result.skipped == 0
            losses.append(result.terms.loss.item())
        return training, losses

    (eager, expected), (graph, found) = run(False), run(True)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    assert found == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(graph.loss.center, eager.loss.center, rtol=1e-2, atol=tolerance)
    for name in ("student", "teacher"):
        theirs = getattr(eager, name).state_dict()
        for key, value in getattr(graph, name).state_dict().items():
            if not key.endswith("qkv.bias"):  # AdamW makes the keys' of rounding noise
                torch.testing.assert_close(
                    value, theirs[key], rtol=1e-2, atol=2e-4 if precision == "fp32" else 2e-2
                )
    groups = state_of(graph, step=14, recipe=recipe, scale={})["optimizer"]["param_groups"]
    assert [type(group["lr"]) for group in groups] == [float, float]


@needs_cuda
def test_a_captured_step_that_is_not_finite_changes_nothing() -> None:
    here = World(0, 1, torch.device("cuda", 0))
    torch.manual_seed(0)
    recipe = recipe_from_dict({**TINY_RECIPE, "data": {"train": "x"}, "device": "cuda"})
    training = make_training(recipe, here)
    step = CapturedStep[StepResult](training, partial(train_step, training))
    crops = [torch.randn(4, 3, side, side, device="cuda") for side in (16, 16, 8, 8)]
    for _ in range(6):
        assert step([crops], RATES).skipped == 0
    before = {k: v.clone() for k, v in training.student.state_dict().items()}
    assert step([[torch.full_like(crop, torch.nan) for crop in crops]], RATES).skipped == 1
    for name, value in training.student.state_dict().items():
        assert torch.equal(value, before[name])
    assert step([crops], RATES).skipped == 0
