import torch
import torch.nn.functional as F

from training.evaluation.linear_probes import LinearProbes
from training.evaluation.linear_run import learning_rates

CPU = torch.device("cpu")
BASES = [0.001, 0.1, 3.0]


def test_each_rate_is_the_optimizer_on_its_own() -> None:
    """The original's loop: nn.Linear, SGD, CosineAnnealingLR moved once an epoch."""
    torch.manual_seed(0)
    features, labels = torch.randn(3, 20, 7), torch.randint(0, 6, (3, 20))
    probes = LinearProbes(3, 7, 6, seed=5, device=CPU)
    assert torch.equal(probes.weight[0], probes.weight[2])
    layers = []
    for place in range(3):
        layer = torch.nn.Linear(7, 6)
        layer.load_state_dict({"weight": probes.weight[place].T, "bias": probes.bias[place]})
        layers.append(layer)
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=base * 20 / 256, momentum=0.9, weight_decay=0)
        for layer, base in zip(layers, BASES, strict=True)
    ]
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, 4, eta_min=0) for each in optimizers
    ]
    for epoch in range(4):
        lrs = learning_rates(BASES, batch=20, epoch=epoch, epochs=4)
        for batch, truth in zip(features, labels, strict=True):
            losses = probes.step(batch, truth, torch.tensor(lrs), batch=20)
            for layer, optimizer, loss in zip(layers, optimizers, losses, strict=True):
                optimizer.zero_grad()
                expected = F.cross_entropy(layer(batch), truth)
                expected.backward()
                optimizer.step()
                torch.testing.assert_close(loss / 20, expected.detach())
        for schedule in schedules:
            schedule.step()
    for place, layer in enumerate(layers):
        torch.testing.assert_close(probes.weight[place].T, layer.weight.detach())
        torch.testing.assert_close(probes.bias[place], layer.bias.detach())


def test_the_initial_weights() -> None:
    probes = LinearProbes(1, 400, 100, seed=0, device=CPU)
    assert abs(probes.weight.std().item() - 0.01) < 2e-4
    assert abs(probes.weight.mean().item()) < 2e-4
    assert not probes.bias.any()
    assert not torch.equal(probes.weight, LinearProbes(1, 400, 100, seed=1, device=CPU).weight)


def test_hits_are_counted_for_each_rate() -> None:
    probes = LinearProbes(3, 8, 8, seed=0, device=CPU)
    probes.weight[0] = torch.eye(8)
    probes.weight[1] = -torch.eye(8)  # the right class comes last
    probes.weight[2] = torch.nan  # diverged: nothing is right
    assert probes.hits(torch.eye(8), torch.arange(8)).tolist() == [[8, 8], [0, 0], [0, 0]]
    shifted = torch.eye(8) + 2 * torch.eye(8).roll(1, dims=1)  # the right class is second
    assert probes.hits(shifted, torch.arange(8))[0].tolist() == [0, 8]


def test_fewer_classes_than_five() -> None:
    probes = LinearProbes(1, 2, 2, seed=0, device=CPU)
    probes.weight[0] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert probes.hits(torch.eye(2), torch.arange(2)).tolist() == [[0, 2]]


def test_an_empty_part_of_a_batch_moves_on_by_momentum_alone() -> None:
    probes = LinearProbes(1, 4, 3, seed=0, device=CPU)
    rates = torch.tensor([0.5])
    probes.step(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), rates, batch=6)
    before, velocity = probes.weight.clone(), probes.state()["weight_velocity"].clone()
    loss = probes.step(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), rates, batch=1)
    assert loss.tolist() == [0.0]
    torch.testing.assert_close(probes.weight, before - 0.5 * 0.9 * velocity)
