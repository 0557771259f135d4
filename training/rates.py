"""What the schedules say for one step."""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from training.config import Recipe
from training.schedules import cosine, linear_warmup


@dataclass(frozen=True)
class Rates:
    """What the schedules say for one step; see `rates_at`.

    In a step that is captured as a CUDA graph the numbers are scalars on the device.
    """

    lr: float | Tensor
    weight_decay: float | Tensor
    teacher_momentum: float | Tensor
    teacher_temperature: float | Tensor
    last_layer_frozen: bool

    def logged(self) -> dict[str, float]:
        """The rates that a log shows."""
        return {k: float(v) for k, v in asdict(self).items() if k != "last_layer_frozen"}

    def on_device(self, numbers: Tensor) -> "Rates":
        """The same with scalars that are read from `numbers`, float64 [4], as `numbers` says.

        In double precision: 1 - momentum comes close to 0 at the end of a run.
        """
        lr, weight_decay, momentum, temperature = numbers.unbind()
        return replace(
            self,
            lr=lr.float(),
            weight_decay=weight_decay,
            teacher_momentum=momentum,
            teacher_temperature=temperature.float(),
        )

    def numbers(self) -> Tensor:
        """What `on_device` reads, on the CPU."""
        found = (self.lr, self.weight_decay, self.teacher_momentum, self.teacher_temperature)
        return torch.tensor(found, dtype=torch.float64)


def rates_at(step: int, steps_per_epoch: int, recipe: Recipe, *, batch: int) -> Rates:
    """The rates of a step; the learning rate is scaled linearly with the whole `batch` / 256."""
    optimizer, loss = recipe.optimizer, recipe.loss
    total = recipe.epochs * steps_per_epoch
    epoch = step // steps_per_epoch
    return Rates(
        lr=cosine(
            step,
            base=optimizer.lr * batch / 256,
            final=optimizer.min_lr,
            total_steps=total,
            warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch),
        ),
        weight_decay=cosine(
            step,
            base=optimizer.weight_decay,
            final=optimizer.weight_decay_end,
            total_steps=total,
        ),
        teacher_momentum=cosine(step, base=recipe.teacher.momentum, final=1.0, total_steps=total),
        teacher_temperature=linear_warmup(
            epoch,
            start=loss.warmup_teacher_temperature,
            end=loss.teacher_temperature,
            warmup_epochs=loss.warmup_teacher_epochs,
        ),
        last_layer_frozen=epoch < optimizer.freeze_last_layer_epochs,
    )
