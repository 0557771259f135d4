"""The collapse alarm: what teacher entropy and KL say of a run, in words (paper, section 5.3).

The cross-entropy is the teacher's entropy + KL(teacher || student). Where KL goes to 0, every
picture gets the same output, and the entropy tells which one: 0 where one dimension dominates,
ln K where all are alike.
"""

import math
from dataclasses import dataclass

ROWS = 5  # that show a pattern one after another before it counts

# Shares of ln K, from runs made to collapse, at K = 256 to 65536. Healthy runs start close to
# uniform, with KL above .01 ln K and entropy below .985 ln K; runs without sharpening fall below
# the limits within 100 steps, and runs without centring below theirs within 150.
_UNIFORM_KL = 0.002
_UNIFORM_ENTROPY = 0.99
_DOMINATED_LOSS = 0.05
_STUCK_LOSS = 0.98
_STUCK_KL = 0.004  # below it the student follows a teacher that says little: see `uniform`


@dataclass
class _Pattern:
    """Something that may show in a row, and whether it has lasted.

    Attributes:
        shown: whether it lasts; turns when enough rows in a row say the contrary.
    """

    name: str
    advice: str
    patience_steps: int
    shown: bool = False
    _rows: int = 0
    _since: int = 0

    def turns(self, holds: bool, step: int) -> bool:
        """Takes in whether a row shows it; says whether `shown` has changed."""
        if holds == self.shown:
            self._rows = 0
            return False
        if self._rows == 0:
            self._since = step
        self._rows += 1
        if self._rows < ROWS or step - self._since < self.patience_steps:
            return False
        self.shown, self._rows = holds, 0
        return True


class CollapseAlarm:
    """Fed with the log's rows, speaks when a collapse has lasted, once, and when it is over.

    For cross-entropy and a teacher whose distributions are over K dimensions (`loss.kind`).

    Args:
        out_dim: K.
        warmup_steps: of the learning rate; a loss that stays at ln K is normal until then.
        total_steps: of the run; a loss is called stuck after a fifth of it, 1000 steps at most.
        patience_steps: over which a collapse must show, in at least `ROWS` rows.
    """

    def __init__(
        self,
        out_dim: int,
        *,
        warmup_steps: int = 0,
        total_steps: int = 5000,
        patience_steps: int = 100,
    ) -> None:
        self._ceiling = math.log(out_dim)
        self._warmup_steps = warmup_steps
        self._dominated = _Pattern(
            "collapse, one output dimension dominates",
            "The centre does not keep up with the teacher: set loss.centering = true and "
            "loss.center_momentum = 0.9, raise loss.teacher_temperature, or lower optimizer.lr",
            patience_steps,
        )
        self._uniform = _Pattern(
            "collapse, all output dimensions are alike",
            "The teacher is not sharp enough: lower loss.teacher_temperature and "
            "loss.warmup_teacher_temperature (0.04 holds where 0.07 from the start does not), "
            "lengthen loss.warmup_teacher_epochs, or lower optimizer.lr",
            patience_steps,
        )
        self._stuck = _Pattern(
            "the loss stays at ln K, the student learns nothing",
            "Raise optimizer.lr (the rate used is lr x whole batch / 256), lower "
            "teacher.momentum (0.99 for runs of few steps), lower head.out_dim (for few "
            "pictures), or lower loss.teacher_temperature",
            max(patience_steps, min(1000, total_steps // 5)),
        )

    def see(self, step: int, entropy: float, kl: float) -> list[str]:
        """Takes in a row: the means of teacher entropy and KL, in nats, after `step` steps.

        Returns what is new, a line each: "ALARM: <what> (<figures>). <advice>." or
        "cleared: <what> (<figures>)." A row that is not finite shows nothing.
        """
        loss, ceiling = entropy + kl, self._ceiling
        uniform = kl <= _UNIFORM_KL * ceiling and entropy >= _UNIFORM_ENTROPY * ceiling
        said = [
            self._say(self._dominated, loss <= _DOMINATED_LOSS * ceiling, step, entropy, kl),
            self._say(self._uniform, uniform, step, entropy, kl),
        ]
        far = loss >= _STUCK_LOSS * ceiling and kl >= _STUCK_KL * ceiling
        stuck = far and step > self._warmup_steps
        said.append(self._say(self._stuck, stuck, step, entropy, kl))
        return [line for line in said if line]

    def _say(
        self, pattern: _Pattern, holds: bool, step: int, entropy: float, kl: float
    ) -> str | None:
        if not pattern.turns(holds, step):
            return None
        figures = (
            f"loss {entropy + kl:.3f}, teacher entropy {entropy:.3f}, KL {kl:.4f}, "
            f"ln K = {self._ceiling:.3f}"
        )
        if pattern.shown:
            return f"ALARM: {pattern.name} ({figures}). {pattern.advice}."
        return f"cleared: {pattern.name} ({figures})."
