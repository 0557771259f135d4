"""Settings that a recipe leaves to the data set: what "auto" becomes, and why.

The paper's values are for 1.28 million pictures, a batch of 1024 and 100 to 800 epochs. What
carries over to other sizes, and how far, is worked out at each function below.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.tables import require

if TYPE_CHECKING:
    from training.config import Recipe

AUTO = "auto"

_PAPER_BATCH = 1024
_LONG_RUN_STEPS = 50_000
_LONG_RUN_OUT_DIM = 8192


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much a run sees.

    Attributes:
        pictures: in the data set.
        batch: pictures of an optimizer step, over all processes and accumulated forwards.
        epochs: passes over the pictures.
    """

    pictures: int
    batch: int
    epochs: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; a data set smaller than a batch counts as one."""
        return self.epochs * max(1, self.pictures // self.batch)


def stand_in(table: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The table with a value that any run takes for each "auto", and the keys that were "auto".

    A key that does not know "auto" keeps it, and is refused by its type later.
    """
    keys = tuple(key for key in _RULES if _get(table, key) == AUTO)
    return _with(table, {key: _RULES[key].stand_in for key in keys}), keys


def settle(
    table: Mapping[str, Any], recipe: "Recipe", *, pictures: int, processes: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """The table with every "auto" replaced, and a line for each choice that gives its reason.

    Args:
        table: a recipe's, as TOML tells it.
        recipe: what `stand_in` makes of it, for all that is not "auto".
        pictures: in the data set.
        processes: that share a step.

    Raises:
        ConfigError: there are no pictures.
    """
    require(pictures > 0, "data.train", pictures, "pictures: at least 1 is needed for 'auto'")
    _, keys = stand_in(table)
    batch = recipe.batch_size * recipe.accumulation * processes
    scale = Scale(pictures=pictures, batch=batch, epochs=recipe.epochs)
    values: dict[str, Any] = {
        "head.out_dim": recipe.head.out_dim,
        "loss.teacher_temperature": recipe.loss.teacher_temperature,
        "loss.warmup_teacher_temperature": recipe.loss.warmup_teacher_temperature,
    }
    lines: list[str] = []
    for key, rule in _RULES.items():  # in this order: later rules look at earlier choices
        if key in keys:
            values[key], reason = rule.choose(scale, values)
            lines.append(f"{key} = {values[key]:g} (auto): {reason}")
    return _with(table, {key: values[key] for key in keys}), lines


def out_dim(scale: Scale, _: Mapping[str, Any]) -> tuple[int, str]:
    """K: the power of two nearest to a sixteenth of the pictures, from 1024 to 65536.

    The paper has 65536 dimensions for 1.28 million pictures, 20 to a dimension; the outputs act
    as clusters, and a small set that is spread over as many leaves most of them to single pictures
    (a loss that stays at ln K is the commonest complaint). Its table of K says that few are cheap:
    1024 lose 1.9 points of k-NN, 4096 lose .4. The model in the repository was made with 2048 for
    75,000 pictures, which this rule gives 4096.
    """
    wished = 2 ** round(math.log2(max(1, scale.pictures / 16)))
    chosen = min(max(wished, 1024), 65536)
    share = scale.pictures / chosen
    return chosen, f"{share:.3g} of {scale.pictures} pictures to a dimension, near 16 wished"


def teacher_momentum(scale: Scale, _: Mapping[str, Any]) -> tuple[float, str]:
    """m = 1 - 1/h, where h is how many steps the teacher averages over at the start.

    Three rules bound h. Per picture, the average should not depend on the batch (the scaling rule
    of arXiv 2307.13813: a batch k times as large takes m to the power k): the paper's .996 at 1024
    averages over 250 steps, 256,000 pictures. It is at most 2000 steps, the .9995 that the authors
    advise for small batches (facebookresearch/dino, issue 104). And in a short run all that would
    be most of it, with a teacher still near its random start when the run ends: h is at most 2% of
    the steps. (The two runs on 75,000 pictures in training/recipes/ were tuned to 1.4% and 1.7%.)
    At least 10 steps.
    """
    bounds = {
        "256,000 pictures, as the paper's": 250 * _PAPER_BATCH / scale.batch,
        "the most, for small batches": 2000.0,
        "2% of the run": 0.02 * scale.steps,
    }
    reason, steps = min(bounds.items(), key=lambda bound: bound[1])
    if steps < 10:
        reason, steps = "the least", 10.0
    return round(1 - 1 / steps, 6), f"averages over {steps:.0f} steps of {scale.batch}, {reason}"


def teacher_temperature(scale: Scale, values: Mapping[str, Any]) -> tuple[float, str]:
    """.07 in a long run with a large K, else .04.

    The paper's runs of 100 epochs and more (125,000 steps) rise to .07; fixed at .08 it collapses.
    The original's default is .04 throughout, and its authors advise less, not more, where a run
    collapses. So .04 is the safe value, and .07 is left to runs of at least 50,000 steps with at
    least 8192 dimensions, warmed up.
    """
    long = scale.steps >= _LONG_RUN_STEPS and values["head.out_dim"] >= _LONG_RUN_OUT_DIM
    told = f"{scale.steps} steps, K = {values['head.out_dim']}"
    if long:
        return 0.07, f"a long run ({told}), as the paper's"
    return 0.04, f"the safe value of short runs or a small K ({told})"


def warmup_teacher_temperature(_: Scale, values: Mapping[str, Any]) -> tuple[float, str]:
    """.04, as the paper's, or the final temperature where that is lower."""
    chosen = min(0.04, values["loss.teacher_temperature"])
    return chosen, f"where a warm-up to {values['loss.teacher_temperature']:g} starts"


def warmup_teacher_epochs(scale: Scale, values: Mapping[str, Any]) -> tuple[int, str]:
    """30 epochs as the paper's, at most 30% of the run; none where the temperature stays."""
    end = values["loss.teacher_temperature"]
    if values["loss.warmup_teacher_temperature"] == end:
        return 0, f"the temperature stays at {end:g}"
    chosen = min(30, round(0.3 * scale.epochs))
    return chosen, f"30 as the paper's, at most 30% of {scale.epochs} epochs"


def center_momentum(scale: Scale, _: Mapping[str, Any]) -> tuple[float, str]:
    """.9, and more for batches below 128, so that the centre averages over 1280 pictures.

    In the paper .9 and .99 work and .999 collapses; .9 is the value of all its other runs, down to
    batches of 128. Below that the batch's mean itself is noise, and a longer average makes up for
    it: up to .99.
    """
    chosen = 1 - max(0.01, min(0.1, scale.batch / 1280))
    return round(chosen, 4), f"a batch of {scale.batch}, within .9 to .99"


def warmup_epochs(scale: Scale, _: Mapping[str, Any]) -> tuple[float, str]:
    """A tenth of the run, at most the paper's 10 epochs (which are a tenth of its 100)."""
    return min(10.0, 0.1 * scale.epochs), f"a tenth of {scale.epochs} epochs, at most 10"


@dataclass(frozen=True)
class _Rule:
    choose: Callable[[Scale, Mapping[str, Any]], tuple[float, str]]
    stand_in: float


_RULES: Mapping[str, _Rule] = {
    "head.out_dim": _Rule(out_dim, 1024),
    "teacher.momentum": _Rule(teacher_momentum, 0.996),
    "loss.teacher_temperature": _Rule(teacher_temperature, 0.04),
    "loss.warmup_teacher_temperature": _Rule(warmup_teacher_temperature, 0.04),
    "loss.warmup_teacher_epochs": _Rule(warmup_teacher_epochs, 0),
    "loss.center_momentum": _Rule(center_momentum, 0.9),
    "optimizer.warmup_epochs": _Rule(warmup_epochs, 0),
}


def _get(table: Mapping[str, Any], key: str) -> Any:
    parent, _, leaf = key.partition(".")
    inner = table.get(parent)
    return inner.get(leaf) if isinstance(inner, Mapping) else None


def _with(table: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The table with `values` under their keys, and without the mutation of any part of it."""
    changed = dict(table)
    for key, value in values.items():
        parent, _, leaf = key.partition(".")
        changed[parent] = {**changed[parent], leaf: value}
    return changed
