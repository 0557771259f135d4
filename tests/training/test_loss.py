import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.loss import DinoLoss, cross_entropy, sinkhorn_knopp

K, B = 24, 5


def outputs(crops: int, seed: int = 0) -> Tensor:
    return torch.randn(crops, B, K, generator=torch.Generator().manual_seed(seed))


def pair_by_pair(g_s: Tensor, p_t: Tensor, temperature: float) -> Tensor:
    """The paper's double loop."""
    terms = [
        -(p_t[t] * F.log_softmax(g_s[s].float() / temperature, dim=-1)).sum(-1).mean()
        for t in range(2)
        for s in range(len(g_s))
        if s != t
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("crops", [2, 3, 8])
def test_one_softmax_a_crop_is_the_double_loop(crops: int) -> None:
    p_t = F.softmax(outputs(2, 1) / 0.04, dim=-1)
    results = []
    for function in (cross_entropy, pair_by_pair):
        g_s = outputs(crops).requires_grad_()
        loss = function(g_s, p_t, 0.1)
        (3 * loss).backward()
        results.append((loss.detach(), g_s.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_pieces_for_the_cache_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p_t, results = F.softmax(outputs(2, 1) / 0.04, dim=-1), []
    for cached in (1, 2 * K, 2**19):
        monkeypatch.setattr("training.loss._CACHED", cached)
        g_s = outputs(4).requires_grad_()
        loss = cross_entropy(g_s, p_t, 0.1)
        loss.backward()
        targets = DinoLoss(K).targets(outputs(2), 0.04)
        results.append((loss.detach(), g_s.grad, *targets))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_fp16_keeps_gradients_that_it_could_not_hold() -> None:
    """The loss's scale reaches them before they are rounded to fp16."""
    k, scale = 4096, 2.0**16
    p_t = F.softmax(torch.randn(2, B, k, generator=torch.Generator().manual_seed(1)), dim=-1)
    g_s = torch.zeros(8, B, k, dtype=torch.float16, requires_grad=True)
    (cross_entropy(g_s, p_t, 0.1) * scale).backward()
    wide = torch.zeros(8, B, k, requires_grad=True)
    pair_by_pair(wide, p_t, 0.1).backward()
    assert g_s.grad is not None
    torch.testing.assert_close(g_s.grad.float() / scale, wide.grad, rtol=1e-3, atol=1e-10)


def test_in_bf16_the_loss_is_float32() -> None:
    p_t = F.softmax(outputs(2, 1) / 0.04, dim=-1)
    g_s = outputs(4).bfloat16().requires_grad_()
    loss = cross_entropy(g_s, p_t, 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pair_by_pair(g_s, p_t, 0.1))
    assert g_s.grad is not None
    assert g_s.grad.dtype == torch.bfloat16


def test_the_entropy_is_ln_k_for_uniform_teachers_and_the_kl_the_rest() -> None:
    loss = DinoLoss(K)
    student = outputs(4).flatten(0, 1)
    terms = loss(student, torch.zeros(2 * B, K), 0.04)
    assert terms.teacher_entropy.item() == pytest.approx(math.log(K), rel=1e-6)
    assert terms.kl.item() == pytest.approx(terms.loss.item() - math.log(K), abs=1e-6)
    assert terms.kl > 0


def test_agreement_is_between_different_crops_of_a_picture() -> None:
    first = F.one_hot(torch.tensor([0, 1, 2, 3, 4]), K).float()
    second = F.one_hot(torch.tensor([0, 1, 2, 9, 9]), K).float()
    loss = DinoLoss(K)
    assert loss(torch.cat((second, second)), torch.cat((first, first)), 0.04).agreement == 0.6
    assert loss(torch.cat((second, first)), torch.cat((first, second)), 0.04).agreement == 1.0


def textbook_sinkhorn(x: Tensor, iterations: int) -> Tensor:
    x = x.double().exp()
    for _ in range(iterations):
        x = x / x.sum(0, keepdim=True)
        x = x / x.sum(1, keepdim=True)
    return x


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_knopp(iterations: int) -> None:
    scores = outputs(2).flatten(0, 1) / 0.5
    ours = sinkhorn_knopp(scores, iterations=iterations).exp()
    torch.testing.assert_close(
        ours.double(), textbook_sinkhorn(scores, iterations), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(ours.sum(1), torch.ones(2 * B))


def test_sinkhorn_knopp_bears_low_temperatures() -> None:
    scores = outputs(2).flatten(0, 1) / 1e-4  # exp() of these is infinite
    found = sinkhorn_knopp(scores, iterations=3)
    assert bool(found.exp().isfinite().all())
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2 * B))


def test_batch_softmax_is_the_papers() -> None:
    loss = DinoLoss(K, assignment="batch_softmax", centering=False)
    g_t = outputs(2)
    x = F.softmax(g_t.flatten(0, 1) / 0.5, dim=0)
    torch.testing.assert_close(loss.targets(g_t, 0.5)[0].flatten(0, 1), x / x.sum(1, keepdim=True))


def test_the_centre_is_used_where_asked() -> None:
    g_t = outputs(2)
    for centering in (True, False):
        loss = DinoLoss(K, centering=centering)
        loss.center.copy_(torch.linspace(-1, 1, K))
        expected = F.softmax((g_t - loss.center * centering) / 0.04, dim=-1)
        p_t, entropy = loss.targets(g_t, 0.04)
        torch.testing.assert_close(p_t, expected)
        torch.testing.assert_close(entropy, torch.special.entr(p_t).sum(-1).mean())


def test_sinkhorn_beside_the_centre() -> None:
    g_t = outputs(2)
    loss = DinoLoss(K, assignment="sinkhorn_knopp")
    loss.center.copy_(torch.linspace(-1, 1, K))
    expected = sinkhorn_knopp(((g_t - loss.center) / 0.1).flatten(0, 1), iterations=3)
    p_t, entropy = loss.targets(g_t, 0.1)
    torch.testing.assert_close(p_t.flatten(0, 1), expected.exp())
    torch.testing.assert_close(entropy, torch.special.entr(p_t).sum(-1).mean())


def test_squared_distance_is_the_double_loop() -> None:
    g_s, g_t = outputs(5), outputs(2, 1)
    terms = [
        (F.normalize(g_s[s], dim=-1) - F.normalize(g_t[t], dim=-1)).square().sum(-1).mean()
        for t in range(2)
        for s in range(5)
        if s != t
    ]
    found = DinoLoss(K, kind="mse")(g_s.flatten(0, 1), g_t.flatten(0, 1), 0.04)
    torch.testing.assert_close(found.loss, torch.stack(terms).mean())
    assert found.teacher_entropy == 0.0


def test_the_centre_moves_once_by_all_batches_of_a_step() -> None:
    loss, teachers = DinoLoss(K, center_momentum=0.75), [outputs(2, seed) for seed in (1, 2)]
    for g_t in teachers:
        loss(outputs(3).flatten(0, 1), g_t.flatten(0, 1), 0.04)
    assert not bool(loss.center.any())
    loss.update_center()
    expected = 0.25 * torch.cat(teachers).mean(dim=(0, 1))
    torch.testing.assert_close(loss.center[0], expected)
    loss(outputs(3).flatten(0, 1), torch.full((2 * B, K), torch.nan), 0.04)
    loss.update_center(torch.tensor(1.0))
    torch.testing.assert_close(loss.center[0], expected)
