import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.conftest import CPU, RATES, TINY_RECIPE
from training.config import recipe_from_dict
from training.dino import clip_each_gradient, drop_last_layer_gradient, update_teacher
from training.optimizers import make_optimizer, parameter_groups, take_step
from training.pretrain import train_step
from training.rates import rates_at
from training.state import Training, make_training
from training.weight_norm import WeightNormLinear


def training_of(**changes: Any) -> Training:
    torch.manual_seed(0)
    return make_training(recipe_from_dict({**TINY_RECIPE, "data": {"train": "x"}, **changes}), CPU)


@pytest.fixture
def training() -> Training:
    return training_of()


@pytest.fixture
def crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, side, side, generator=generator) for side in (16, 16, 8, 8)]


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def test_student_and_teacher_start_equal(training: Training) -> None:
    torch.testing.assert_close(copy_of(training.student), copy_of(training.teacher))
    ours, theirs = training.student.parameters(), training.teacher.parameters()
    assert not {p.data_ptr() for p in ours} & {p.data_ptr() for p in theirs}


def test_the_teacher_is_a_moving_average_of_the_student(
    training: Training, crops: list[Tensor]
) -> None:
    before = copy_of(training.teacher)
    train_step(training, [crops], RATES)
    after, student = copy_of(training.teacher), copy_of(training.student)
    expected = {name: 0.9 * before[name] + 0.1 * student[name] for name in before}
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(after["backbone.cls_token"], before["backbone.cls_token"])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_the_momentum(training: Training, momentum: float) -> None:
    with torch.no_grad():
        for parameter in training.student.parameters():
            parameter.add_(0.5)
    before = copy_of(training.teacher)
    update_teacher(training.teacher, training.student, momentum)
    expected = before if momentum == 1.0 else copy_of(training.student)
    torch.testing.assert_close(copy_of(training.teacher), expected)


def test_no_gradient_reaches_the_teacher(training: Training, crops: list[Tensor]) -> None:
    train_step(training, [crops], RATES)
    assert all(p.grad is None and not p.requires_grad for p in training.teacher.parameters())
    assert all(p.grad is not None for p in training.student.parameters() if p.requires_grad)
    ids = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert not ids & {id(p) for p in training.teacher.parameters()}


def test_drop_path_is_the_students_alone() -> None:
    model = {**TINY_RECIPE["model"], "drop_path_rate": 0.3}
    training = training_of(model=model)
    assert training.student.backbone.drop_path_rates[-1] == pytest.approx(0.3)
    assert set(training.teacher.backbone.drop_path_rates) == {0.0}


def test_each_gradient_is_clipped_on_its_own() -> None:
    sizes = {"long": 30.0, "at the limit": 3.0, "short": 0.5, "zero": 0.0}
    parameters = [nn.Parameter(torch.zeros(4, 5)) for _ in sizes]
    directions = [torch.nn.functional.normalize(torch.randn(4, 5).flatten(), dim=0) for _ in sizes]
    for parameter, direction, norm in zip(parameters, directions, sizes.values(), strict=True):
        parameter.grad = (norm * direction).reshape(4, 5)
    without = nn.Parameter(torch.zeros(2))
    total = clip_each_gradient([*parameters, without], 3.0)
    assert total.item() == pytest.approx(math.sqrt(sum(n * n for n in sizes.values())), rel=1e-5)
    norms = [p.grad.norm().item() for p in parameters if p.grad is not None]
    assert norms == pytest.approx([3.0, 3.0, 0.5, 0.0], rel=1e-5)
    assert without.grad is None


def test_a_limit_of_zero_does_not_clip() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([30.0, 40.0, 0.0])
    assert clip_each_gradient([parameter], 0.0).item() == pytest.approx(50.0)
    assert parameter.grad.tolist() == [30.0, 40.0, 0.0]


def test_the_last_layer_is_frozen_for_the_first_epoch(
    training: Training, crops: list[Tensor]
) -> None:
    recipe = recipe_from_dict({**TINY_RECIPE, "data": {"train": "x"}})
    rates = [rates_at(step, 3, recipe, batch=256) for step in range(5)]
    assert [r.last_layer_frozen for r in rates] == [True, True, True, False, False]
    before = copy_of(training.student)
    for rate in rates[1:3]:
        train_step(training, [crops], rate)
    frozen = copy_of(training.student)
    for name in ("head.last_layer.weight_v", "head.last_layer.weight_g"):
        assert torch.equal(frozen[name], before[name]), name
    assert not torch.equal(frozen["head.mlp.0.weight"], before["head.mlp.0.weight"])
    train_step(training, [crops], rates[3])
    name = "head.last_layer.weight_v"
    assert not torch.equal(copy_of(training.student)[name], before[name])


@pytest.mark.parametrize("free", [False, True])
def test_the_last_layers_gain_is_free_only_where_asked(crops: list[Tensor], free: bool) -> None:
    training = training_of(head={**TINY_RECIPE["head"], "norm_last_layer": not free})
    for _ in range(2):
        train_step(training, [crops], RATES)
    gain = training.student.head.last_layer.weight_g
    assert bool((gain == 1.0).all()) is not free


def test_dropping_the_last_layers_gradient_leaves_the_others(training: Training) -> None:
    for parameter in training.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    drop_last_layer_gradient(training.student)
    without = {name for name, p in training.student.named_parameters() if p.grad is None}
    assert without == {"head.last_layer.weight_v", "head.last_layer.weight_g"}


def test_biases_and_norms_do_not_decay(training: Training) -> None:
    decayed, kept = (
        {id(p) for p in group["params"]} for group in parameter_groups(training.student)
    )
    for name, parameter in training.student.named_parameters():
        plain = name.endswith(".bias") or "norm" in name
        assert (id(parameter) in kept) == plain, name
        assert (id(parameter) in decayed) == (not plain and parameter.requires_grad), name


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_what_decay_alone_does(training: Training, name: str) -> None:
    """Without a gradient, decay shrinks weights and leaves biases and norms as they are."""
    student = training.student
    optimizer = make_optimizer(name, student)
    with torch.no_grad():
        student.backbone.norm.bias.fill_(1.0)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy_of(student)
    take_step(optimizer, torch.zeros(()), lr=0.1, weight_decay=0.5)
    after = copy_of(student)
    for fixed in ("backbone.norm.weight", "backbone.norm.bias"):
        assert torch.equal(after[fixed], before[fixed])
    weight = "backbone.blocks.0.mlp.fc1.weight"
    ratio = after[weight].norm() / before[weight].norm()
    # LARS scales the decayed update to eta = 0.001 of the weight's norm.
    shrunk = 1 - 0.1 * 0.001 if name == "lars" else 1 - 0.1 * 0.5
    assert ratio.item() == pytest.approx(shrunk, rel=1e-6)
    torch.testing.assert_close(after[weight], before[weight] * shrunk)


def test_rates_are_set_for_the_right_groups(training: Training) -> None:
    take_step(training.optimizer, torch.zeros(()), lr=0.3, weight_decay=0.2)
    assert [g["lr"] for g in training.optimizer.param_groups] == [0.3, 0.3]
    assert [g["weight_decay"] for g in training.optimizer.param_groups] == [0.2, 0.0]


def test_rates_on_the_device_do_what_numbers_do(crops: list[Tensor]) -> None:
    """A captured step has them there; a skipped one decays nothing, either."""
    found = []
    for rates in (RATES, RATES.on_device(RATES.numbers())):
        training = training_of()
        for seed in range(3):
            torch.manual_seed(seed)
            train_step(training, [[torch.randn_like(crop) for crop in crops]], rates)
        before = copy_of(training.student)
        bad = [torch.full_like(crop, torch.nan) for crop in crops]
        assert train_step(training, [bad], rates).skipped == 1.0
        for name, weight in copy_of(training.student).items():
            assert torch.equal(weight, before[name])
        found.append({**before, **{f"t.{k}": v for k, v in copy_of(training.teacher).items()}})
    for name, weight in found[0].items():
        if name.endswith("qkv.bias"):  # AdamW makes the keys' of rounding noise
            continue
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5)


def test_bf16_is_near_fp32(crops: list[Tensor]) -> None:
    losses, moved = [], []
    for precision in ("fp32", "bf16"):
        training = training_of(precision=precision)
        before = copy_of(training.student)
        terms, norm, _ = train_step(training, [crops], RATES)
        assert terms.loss.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in training.student.parameters())
        assert norm.isfinite()
        name = "backbone.blocks.3.attn.qkv.weight"
        moved.append((training.student.state_dict()[name] - before[name]).norm().item())
        losses.append(terms.loss.item())
    assert losses[0] != losses[1]  # it was another arithmetic
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert moved[1] == pytest.approx(moved[0], rel=0.2)


def test_a_head_with_batch_norm_takes_a_step(crops: list[Tensor]) -> None:
    training = training_of(head={**TINY_RECIPE["head"], "batch_norm": True})
    terms, _, _ = train_step(training, [crops], RATES)
    assert terms.loss.isfinite()
    assert any(isinstance(m, nn.BatchNorm1d) for m in training.student.modules())


@pytest.mark.parametrize("cached", [1, 5 * 8, 2**19])
def test_weight_norm_is_the_textbooks(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.weight_norm._CACHED", cached)
    torch.manual_seed(0)
    layer = WeightNormLinear(8, 13)
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2.0)
    x = torch.randn(5, 8, requires_grad=True)
    weights = torch.randn(5, 13)
    results = []
    for plain in (False, True):
        if plain:
            out = x @ (layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)).T
        else:
            out = layer(x)
        inputs = [x, layer.weight_v, layer.weight_g]
        results.append((out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_forward_before_the_first_ones_backward_is_an_error_not_a_wrong_gradient() -> None:
    layer = WeightNormLinear(8, 13)
    first = layer(torch.randn(5, 8))
    layer(torch.randn(5, 8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()
