import math
from collections.abc import Iterable

import pytest

from tests.training.tiny_runs import Row, rows
from training.collapse import CollapseAlarm

K = 512
FAST = {"lr": 3e-3, "momentum": 0.9}


def said(shown: Iterable[Row], **options: int) -> list[tuple[int, str]]:
    alarm = CollapseAlarm(K, **options)
    return [(row.step, line) for row in shown for line in alarm.see(*row)]


def test_a_healthy_run_raises_no_alarm() -> None:
    """Its student and teacher start alike, and its outputs close to uniform."""
    made = list(rows(120, out_dim=K))
    assert said(made, warmup_steps=20, patience_steps=40) == []
    assert made[-1].kl > 0.03


def test_without_centring_one_dimension_comes_to_dominate() -> None:
    made = list(rows(90, out_dim=K, centering=False, **FAST))
    ((_, line),) = said(made, patience_steps=50)
    assert line.startswith("ALARM: collapse, one output dimension dominates (loss 0.")
    assert "loss.centering = true" in line
    assert said(made, patience_steps=100) == []


def test_without_sharpening_all_dimensions_become_alike() -> None:
    ((_, line),) = said(rows(90, out_dim=K, temperature=0.2, **FAST), patience_steps=50)
    assert line.startswith("ALARM: collapse, all output dimensions are alike (loss 6.2")
    assert "lower loss.teacher_temperature" in line


def test_a_loss_that_stays_at_ln_k_is_told_after_the_warm_up() -> None:
    made = list(rows(100, out_dim=K, lr=1e-7))
    ((step, line),) = said(made, warmup_steps=40, total_steps=250, patience_steps=20)
    assert step == 100
    assert "the loss stays at ln K" in line
    assert "Raise optimizer.lr" in line
    assert said(made, warmup_steps=60, total_steps=250, patience_steps=20) == []
    assert said(made, warmup_steps=0, total_steps=5000, patience_steps=20) == []


def test_an_alarm_is_raised_once_and_cleared_once() -> None:
    def run(*parts: tuple[int, float, float]) -> list[Row]:
        every = [figures for count, *figures in parts for _ in range(count)]
        return [Row(10 * (i + 1), *figures) for i, figures in enumerate(every)]

    good, bad = (3.0, 1.0), (0.01, 0.001)
    told = said(run((20, *good), (30, *bad), (20, *good), (20, *bad)))
    assert [(step, line.split(" (")[0]) for step, line in told] == [
        (310, "ALARM: collapse, one output dimension dominates"),
        (610, "cleared: collapse, one output dimension dominates"),
        (810, "ALARM: collapse, one output dimension dominates"),
    ]
    # A good row in between, as noise gives it, starts the patience anew.
    assert said(run(*[(9, *bad), (1, *good)] * 5)) == []
    assert said(run((4, 0.0, 0.0))) == []
    # Rows far apart still need to be several.
    assert said([Row(1000 * i, *bad) for i in range(1, 5)]) == []


@pytest.mark.parametrize("figures", [(math.nan, math.nan), (math.inf, 1.0)])
def test_rows_that_are_not_finite_show_nothing(figures: tuple[float, float]) -> None:
    assert said(Row(10 * i, *figures) for i in range(1, 50)) == []


def test_exact_zeros_are_a_collapse_too() -> None:
    assert len(said(Row(10 * i, 0.0, 0.0) for i in range(1, 50))) == 1
