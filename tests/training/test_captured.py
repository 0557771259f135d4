"""A step as a CUDA graph does what the same step does kernel by kernel."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbone.vit import VisionTransformer
from tests.training.conftest import RATES, TINY_RECIPE
from training.captured import CapturedStep, can_capture
from training.config import ConfigError, Recipe, recipe_from_dict
from training.distributed import World
from training.loss import LossTerms
from training.pretrain import StepResult, train_step
from training.rates import Rates
from training.state import Training, make_training

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


@pytest.fixture
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list["FakeGraph"]:
    """CUDA graphs that note what is run in them instead of doing it, and do it when replayed."""
    made: list[FakeGraph] = []

    def make() -> FakeGraph:
        made.append(FakeGraph())
        return made[-1]

    @contextmanager
    def capturing(graph: FakeGraph, **_: object) -> Iterator[None]:
        graph.capturing = True
        yield
        graph.capturing = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    return made


class FakeGraph:
    """Replays `train_step` with the very arguments that it was captured with."""

    def __init__(self) -> None:
        self.capturing = False
        self.captured: Callable[[], None] | None = None
        self.replays = 0

    def replay(self) -> None:
        assert self.captured is not None
        self.captured()
        self.replays += 1


def steps_of(recipe: Recipe, device: torch.device, count: int) -> Iterator[tuple[int, Any, Rates]]:
    """The step's number, its batches and its rates, which all change; the last layer thaws."""
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        batches = [
            [
                torch.randn(4, 3, side, side, generator=generator).to(device)
                for side in (16, 16, 8, 8, 8)
            ]
            for _ in range(recipe.accumulation)
        ]
        rates = dataclasses.replace(
            RATES,
            lr=1e-3 / (i + 1),
            weight_decay=0.04 * (i + 1),
            teacher_momentum=0.9 + i / 200,
            teacher_temperature=0.04 + i / 500,
            last_layer_frozen=i < 6,
        )
        yield i, batches, rates


def recipe_of(precision: str, accumulation: int, **changes: Any) -> Recipe:
    table = {
        **TINY_RECIPE,
        "data": {"train": "x"},
        "precision": precision,
        "accumulation": accumulation,
        "model": {**TINY_RECIPE["model"], "drop_path_rate": 0.3},
        **changes,
    }
    return recipe_from_dict(table)


def weights_of(network: nn.Module) -> Tensor:
    """All of them, but the keys' bias, which AdamW makes of rounding noise."""
    values = network.state_dict().items()
    return torch.cat([v.double().flatten() for k, v in values if not k.endswith("qkv.bias")])


def check_same(found: Training, expected: Training, start: Training, *, tolerance: float) -> None:
    """How far the two moved apart, as a share of how far they moved."""
    for name in ("student", "teacher"):
        ours, theirs, before = (
            weights_of(getattr(each, name)) for each in (found, expected, start)
        )
        assert ((ours - theirs).norm() / (theirs - before).norm()).item() < tolerance
    center = expected.loss.center
    assert ((found.loss.center - center).norm() / center.norm()).item() < tolerance


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_graph_reads_what_every_step_puts_there(
    accumulation: int, graphs_on_the_cpu: list[FakeGraph]
) -> None:
    """All but CUDA's own part: rates, crops and choices of each step, and a graph for each kind."""
    recipe = recipe_of("fp32", accumulation)
    here = World(0, 1, torch.device("cpu"))

    def make() -> Training:
        torch.manual_seed(0)
        training = make_training(recipe, here)
        assert isinstance(training.student.backbone, VisionTransformer)
        training.student.backbone.fixed_shapes = True
        return training

    start, plain, captured = make(), make(), make()
    backbone = captured.student.backbone
    assert isinstance(backbone, VisionTransformer)

    def step(batches: Any, rates: Rates, *, ends_epoch: bool = False) -> StepResult:
        graph = graphs_on_the_cpu[-1] if graphs_on_the_cpu else None
        if graph is None or not graph.capturing:
            return train_step(captured, batches, rates, ends_epoch=ends_epoch)
        places = list(backbone.drawn)
        held = StepResult(
            LossTerms(*(torch.zeros(()) for _ in LossTerms._fields)),
            torch.zeros(()),
            torch.ones(()),
        )

        def again() -> None:
            backbone.drawn = list(places)
            # A real graph's replay converts the numbers anew; so does this.
            read = rates.on_device(one._numbers)
            done = train_step(captured, batches, read, ends_epoch=ends_epoch)
            for place, value in zip(
                (*held.terms, *held[1:]), (*done.terms, *done[1:]), strict=True
            ):
                place.copy_(value)

        graph.captured = again
        return held

    one = CapturedStep[StepResult](captured, step)
    for i, batches, rates in steps_of(recipe, here.device, 14):
        torch.manual_seed(100 + i)
        expected = train_step(plain, batches, rates).terms.loss.item()
        torch.manual_seed(100 + i)
        result = one(batches, rates)
        assert result.skipped == 0
        assert result.terms.loss.item() == pytest.approx(expected, rel=1e-5)
        groups = captured.optimizer.param_groups
        assert [group["lr"] for group in groups] == [rates.lr] * 2
        assert [group["weight_decay"] for group in groups] == [rates.weight_decay, 0.0]
        assert not any(group["capturable"] for group in groups)
    check_same(captured, plain, start, tolerance=1e-4)
    assert [graph.replays for graph in graphs_on_the_cpu] == [3, 5]  # frozen, and thawed
    assert backbone.drawn == []


def test_a_step_that_cannot_be_captured_is_told_and_leaves_nothing_behind(
    graphs_on_the_cpu: list[FakeGraph],
) -> None:
    recipe = recipe_of("fp32", 1)
    here = World(0, 1, torch.device("cpu"))
    training = make_training(recipe, here)
    backbone = training.student.backbone
    assert isinstance(backbone, VisionTransformer)
    backbone.fixed_shapes = True

    def step(batches: Any, rates: Rates, *, ends_epoch: bool = False) -> StepResult:
        if graphs_on_the_cpu:
            raise RuntimeError("CUDA error: operation not permitted\nfor details see")
        return train_step(training, batches, rates)

    one = CapturedStep[StepResult](training, step)
    steps = steps_of(recipe, here.device, 4)
    for _, batches, rates in islice(steps, 3):
        one(batches, rates)
    _, batches, rates = next(steps)
    words = (
        r"cuda_graph = true: .* \(CUDA error: operation not permitted\); take cuda_graph = false"
    )
    with pytest.raises(ConfigError, match=words):
        one(batches, rates)
    assert backbone.drawn == []
    assert [type(group["lr"]) for group in training.optimizer.param_groups] == [float, float]
    assert not any(group["capturable"] for group in training.optimizer.param_groups)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_captured_step_is_the_same_step(
    precision: str, accumulation: int, recompute: bool
) -> None:
    """Losses, networks and centre, with stochastic depth, and a last layer that thaws."""
    here = World(0, 1, torch.device("cuda", 0))
    recipe = recipe_of(precision, accumulation, device="cuda", checkpoint_blocks=recompute)

    def make() -> Training:
        torch.manual_seed(0)
        return make_training(recipe, here)

    start, plain, captured = make(), make(), make()
    one = CapturedStep[StepResult](captured, partial(train_step, captured))
    for i, batches, rates in steps_of(recipe, here.device, 14):
        torch.manual_seed(100 + i)
        expected = train_step(plain, batches, rates)
        torch.manual_seed(100 + i)
        found = one(batches, rates)
        assert found.skipped == 0
        assert found.terms.loss.item() == pytest.approx(
            expected.terms.loss.item(), rel=1e-5 if precision == "fp32" else 3e-2
        )
    check_same(captured, plain, start, tolerance=1e-2 if precision == "fp32" else 0.5)


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
