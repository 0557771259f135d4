"""Stochastic depth (arXiv 1603.09382): in training, a picture's branch is dropped whole by chance.

Shapes as in `backbone.vit`: B pictures, T tokens each, of groups of pictures of one size.
"""

from collections.abc import Sequence
from typing import NamedTuple

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

On a CPU the dropped pictures are left out of the computation. On a GPU they are computed and
multiplied by 0: shapes that change could be neither compiled once nor captured as a graph, and
leaving out moves every token twice more. Which ones are dropped is the same.
"""


def draw_choices(rates: Sequence[float], groups: Sequence[Group]) -> list[Kept]:
    """The choices of one forward on a CPU, each block's on its own; `rates` are the blocks'."""
    branches: list[Branch] = [
        None if some is None else _choice(some, groups) for some in _draw(_twice(rates), groups)
    ]
    return list(zip(branches[::2], branches[1::2], strict=True))


def draw_factors(rates: Sequence[float], groups: Sequence[Group]) -> Tensor:
    """The same choices as the factors of `Factors.pictures`, [branches that may drop, sum of B].

    Drawn on the CPU as well, whose random state a run can seed.
    """
    twice = _twice(rates)
    some = [
        torch.cat(kept) / (1.0 - rate)
        for kept, rate in zip(_draw(twice, groups), twice, strict=True)
        if kept is not None
    ]
    return torch.stack(some)


def spread_factors(factors: Tensor, rates: Sequence[float], groups: Sequence[Group]) -> list[Kept]:
    """What `draw_factors` gave, on the tokens' device -> each block's `Factors`.

    Args:
        factors: float32 [branches that may drop, sum of B].
        rates: the blocks', as they were drawn with.
        groups: of the pictures that were drawn for, now with their tokens.
    """
    by_group = torch.split(factors, [b for b, _ in groups], dim=1)
    tokens = torch.cat(
        [
            part[..., None].expand(-1, -1, t).flatten(1)
            for part, (_, t) in zip(by_group, groups, strict=True)
        ],
        dim=1,
    )
    made = iter(zip(tokens[..., None].unbind(), factors[..., None].unbind(), strict=True))
    branches = [Factors(*next(made)) if rate else None for rate in _twice(rates)]
    return list(zip(branches[::2], branches[1::2], strict=True))


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


def _draw(rates: Sequence[float], groups: Sequence[Group]) -> list[list[Tensor] | None]:
    """Of each branch that may drop and each group, which pictures it keeps: bool [B]."""
    return [[torch.rand(b) >= rate for b, _ in groups] if rate else None for rate in rates]


def _twice(rates: Sequence[float]) -> list[float]:
    """Each block's rate for both of its branches."""
    return [rate for rate in rates for _ in range(2)]
