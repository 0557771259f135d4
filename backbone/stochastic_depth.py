"""Stochastic depth (arXiv 1603.09382): in training, a picture's branch is dropped whole by chance.

Shapes as in `backbone.vit`: B pictures, T tokens each, of groups of pictures of one size.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

Group = tuple[int, int]
"""Pictures of one size: how many, and how many tokens each of them has."""


class Choice(NamedTuple):
    """The pictures whose branch is not dropped: their tokens' rows, numbers and groups."""

    rows: Tensor
    pictures: Tensor
    groups: list[Group]


class Factors(NamedTuple):
    """What a branch is multiplied by, 0 or 1 / (1 - rate): [sum of B * T, 1] and [sum of B, 1]."""

    tokens: Tensor
    pictures: Tensor


Branch = Choice | Factors | None
Kept = tuple[Branch, Branch]
"""What stochastic depth leaves of a block's two branches; None is all.

On a CPU the dropped pictures are left out of the computation. On a GPU that would cost more than it
saves, for it moves every token twice more, and changing shapes cannot be compiled once: there
they are computed and multiplied by 0. Which ones are dropped is the same.
"""


def draw_paths(
    rates: Sequence[float],
    groups: Sequence[Group],
    device: torch.device,
    *,
    fixed_shapes: bool,
) -> list[Kept]:
    """The choices of one forward, each block's on its own.

    Drawn on the CPU, whose random state a run can seed: the host knows every shape without waiting
    for the device.

    Args:
        rates: each block's probability that a branch is dropped.
        device: of the tokens.
        fixed_shapes: gives `Factors`, else each a `Choice`.
    """
    twice = [rate for rate in rates for _ in range(2)]
    drawn = [[torch.rand(b) >= rate for b, _ in groups] if rate else None for rate in twice]
    branches: list[Branch]
    if fixed_shapes:
        branches = _factors(drawn, twice, groups, device)
    else:
        branches = [None if some is None else _choice(some, groups) for some in drawn]
    return list(zip(branches[::2], branches[1::2], strict=True))


def is_choice(branch: Branch) -> TypeGuard[Choice]:
    """Whether `branch` leaves pictures out."""
    return isinstance(branch, Choice)


def _choice(kept: Sequence[Tensor], groups: Sequence[Group]) -> Choice:
    """Of each group's bool [B]."""
    rows, pictures, sizes, start, first = [], [], [], 0, 0
    for some, (b, t) in zip(kept, groups, strict=True):
        chosen = some.nonzero()
        rows.append((start + chosen * t + torch.arange(t)).flatten())
        pictures.append(first + chosen.flatten())
        sizes.append((len(chosen), t))
        start += b * t
        first += b
    return Choice(torch.cat(rows), torch.cat(pictures), sizes)


def _factors(
    drawn: Sequence[Sequence[Tensor] | None],
    rates: Sequence[float],
    groups: Sequence[Group],
    device: torch.device,
) -> list[Branch]:
    """Of each branch's and each group's bool [B], by one transfer that nobody waits for."""
    some = [
        torch.cat(list(kept)) / (1.0 - rate)
        for kept, rate in zip(drawn, rates, strict=True)
        if kept is not None
    ]
    together = torch.stack(some)
    if device.type == "cuda":
        together = together.pin_memory()
    pictures = together.to(device, non_blocking=True)[..., None]
    by_group = torch.split(pictures, [b for b, _ in groups], dim=1)
    tokens = torch.cat(
        [part.expand(-1, -1, t).flatten(1) for part, (_, t) in zip(by_group, groups, strict=True)],
        dim=1,
    )[..., None]
    made = iter(zip(tokens.unbind(), pictures.unbind(), strict=True))
    return [None if kept is None else Factors(*next(made)) for kept in drawn]
