"""Parameter groups, and LARS, which the framework does not have.

Every optimizer here looks at its attribute `found_inf`, a scalar on the device: above 0, `step`
leaves parameters and state as they are, without the host ever waiting to know.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Two groups: weights, which decay, and biases and one-dimensional parameters, which do not.

    As in the original, "not decayed" is a weight_decay of 0 that the loop never changes, and
    CLS, positions and the last layer's gain (all of more than one dimension) decay.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (kept if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


def make_optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that a recipe names: adamw, sgd or lars; the loop sets lr and weight decay.

    Raises:
        ValueError: another name.
    """
    groups = parameter_groups(network)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        for group in sgd.param_groups:
            for parameter in group["params"]:
                # A first step that is skipped would leave the framework's buffer uninitialised.
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name == "lars":
        return Lars(groups)
    raise ValueError(f"optimizer {name!r} is not one of adamw, sgd, lars")


def take_step(
    optimizer: torch.optim.Optimizer,
    skipped: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
) -> None:
    """One update with this step's rates; weight decay is the first group's alone.

    Args:
        skipped: where this scalar on the device is above 0, nothing changes.
        lr, weight_decay: both numbers, or both scalars on the device (AdamW alone), whose values a
            captured step reads anew each time.

    Raises:
        TypeError: scalars on the device, and another optimizer.
    """
    flagged: Any = optimizer  # its class does not declare the two attributes that `step` looks for
    flagged.grad_scale, flagged.found_inf = None, skipped
    decayed = optimizer.param_groups[0]
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(lr, Tensor):
        if not isinstance(optimizer, torch.optim.AdamW):
            raise TypeError(f"rates on the device are for AdamW, not {type(optimizer).__name__}")
        # Its kernel takes the rate from the device, but not the decay: it is done before.
        weights = [each for each in decayed["params"] if each.grad is not None]
        share = torch.where(skipped > 0, 0.0, (lr * weight_decay).float())
        with torch.no_grad():
            torch._foreach_sub_(weights, torch._foreach_mul(weights, share))
        weight_decay = 0.0
    decayed["weight_decay"] = weight_decay
    optimizer.step()


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888).

    Biases and norms (one-dimensional parameters) get plain momentum SGD: neither decay nor scaling.
    """

    def __init__(self, params: Any, *, momentum: float = 0.9, eta: float = 0.001) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is refused."""
        if closure is not None:
            raise ValueError("LARS takes no closure")
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim != 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    update = update * _trust_ratio(parameter, update, group["eta"])
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                moved = state["momentum"] * group["momentum"] + update
                if skip is not None:
                    moved = torch.where(skip > 0, state["momentum"], moved)
                state["momentum"].copy_(moved)
                if skip is not None:
                    moved = torch.where(skip > 0, 0.0, moved)
                parameter.add_(moved, alpha=-group["lr"])


def _trust_ratio(parameter: Tensor, update: Tensor, eta: float) -> Tensor:
    weight_norm, update_norm = parameter.norm(), update.norm()
    ratio = eta * weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
