"""Schedules as pure functions of the step: no state, so that resuming cannot forget any."""

import math


def cosine(
    step: int,
    *,
    base: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
) -> float:
    """Linear warm-up from `start` to `base`, then half a cosine from `base` to `final`.

    As in the original: the last step of the warm-up is at `base` already, and so is the first
    after it; `final` would be reached at `total_steps`, one after the last step.
    """
    if step < warmup_steps:
        return start + (base - start) * (step / (warmup_steps - 1) if warmup_steps > 1 else 0.0)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def linear_warmup(epoch: int, *, start: float, end: float, warmup_epochs: int) -> float:
    """`start` rising to `end` at the warm-up's last epoch, and constant from there on."""
    if epoch >= warmup_epochs:
        return end
    if warmup_epochs == 1:
        return start
    return start + (end - start) * epoch / (warmup_epochs - 1)
