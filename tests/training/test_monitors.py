import csv
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.training.conftest import log_rows
from training.collapse import CollapseAlarm
from training.config import ConfigError
from training.distributed import World
from training.monitors import COLUMNS, Monitor
from training.wandb_run import start_wandb

CPU = World(0, 1, torch.device("cpu"))
RATES = {
    "lr": 0.5,
    "weight_decay": 0.04,
    "teacher_momentum": 0.99,
    "teacher_temperature": 0.04,
}


def figures(loss: float, entropy: float = 1.0) -> dict[str, Tensor]:
    values = {
        "loss": loss,
        "teacher_entropy": entropy,
        "kl": loss - entropy,
        "center_norm": 2.0,
        "gradient_norm": 3.0,
        "agreement": 0.25,
    }
    return {name: torch.tensor(value) for name, value in values.items()}


def run(
    run_dir: Path,
    losses: list[float],
    *,
    start: int = 0,
    entropy: float = 1.0,
    every: int = 2,
    **options: Any,
) -> list[dict[str, str]]:
    """Logs these losses, and gives the log's rows."""
    stop = start + len(losses)
    monitor = Monitor(run_dir, CPU, start=start, stop=stop, batch_size=8, every=every, **options)
    with monitor:
        for step, loss in enumerate(losses, start):
            counts = {"skipped_steps": 1.0, "bad_pictures": float(step)}
            monitor.step(step, step // 4, figures(loss, entropy), RATES, counts)
    return log_rows(run_dir)


def test_every_column_has_its_value(tmp_path: Path) -> None:
    first, second = run(tmp_path, [2.0, 4.0, 6.0])
    assert tuple(first) == COLUMNS
    expected = {
        **RATES,
        "step": 2,
        "epoch": 0,
        "loss": 3.0,
        "teacher_entropy": 1.0,
        "kl": 2.0,
        "center_norm": 2.0,
        "gradient_norm": 3.0,
        "agreement": 0.25,
        "skipped_steps": 1,
        "bad_pictures": 1,
    }
    assert {name: float(first[name]) for name in expected} == pytest.approx(expected)
    assert 10 < float(first["memory_mib"]) < 100_000
    assert float(first["images_per_s"]) > 0
    assert float(first["eta_s"]) > 0
    assert (float(second["loss"]), second["step"], second["eta_s"]) == (6.0, "3", "0")


def test_steps_that_are_not_finite_are_left_out_of_the_means(tmp_path: Path) -> None:
    first, second = run(tmp_path, [2.0, math.nan, math.inf, math.nan])
    assert float(first["loss"]) == 2.0
    assert second["loss"] == "nan"


def test_waiting_counts_and_pausing_does_not(tmp_path: Path) -> None:
    with Monitor(tmp_path, CPU, start=0, stop=1, batch_size=8, every=1) as monitor:
        with monitor.waiting():
            time.sleep(0.05)
        with monitor.pausing():
            time.sleep(0.4)
        monitor.step(0, 0, figures(1.0), RATES)
    (row,) = log_rows(tmp_path)
    assert float(row["data_wait_share"]) > 0.15  # of 0.05 s and little else
    assert float(row["images_per_s"]) > 8 / 0.35


def test_the_bar_counts_every_step(tmp_path: Path) -> None:
    figures = {"loss": torch.tensor(1.0)}
    with Monitor(tmp_path, CPU, start=3, stop=9, batch_size=8, every=20) as monitor:
        for step in (3, 4):
            monitor.step(step, 0, figures, {})
            assert monitor._bar.n == step + 1


def test_a_resumed_run_keeps_rows_of_fewer_columns(tmp_path: Path) -> None:
    tmp_path.joinpath("log.csv").write_text("step,epoch,loss\n1,0,9\n2,0,8.5\n3,0,8\n4,0")
    rows = run(tmp_path, [2.0, 2.0], start=2)
    assert [(row["step"], row["loss"], row["kl"]) for row in rows] == [
        ("1", "9", ""),
        ("2", "8.5", ""),
        ("4", "2", "1"),
    ]
    assert tuple(rows[0]) == COLUMNS


def test_tensorboard_has_every_column_by_its_name(tmp_path: Path) -> None:
    with Monitor(tmp_path, CPU, start=0, stop=1, batch_size=8, every=1) as monitor:
        monitor.step(0, 0, figures(2.0), RATES, {"skipped_steps": 0, "bad_pictures": 0})
        monitor.scalars(1, {"knn/teacher_top1": 33.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*COLUMNS[1:], "knn/teacher_top1"}
    assert [e.value for e in events.Scalars("loss")] == [2.0]


def test_an_alarm_is_printed_and_kept_once_over_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def alarm() -> CollapseAlarm:
        return CollapseAlarm(64, patience_steps=10)

    collapsed = {"entropy": 0.0, "every": 2}
    run(tmp_path, [0.0] * 20, alarm=alarm(), **collapsed)
    lines = tmp_path.joinpath("alarms.log").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step 12: ALARM: collapse, one output dimension dominates")
    assert lines[0] in capsys.readouterr().err
    # Resumed after the alarm: known. Resumed before it: said again, and stands there once.
    for start in (16, 6):
        with tmp_path.joinpath("alarms.log").open("a") as file:
            file.write("st")  # half a line, from a machine that went down
        run(tmp_path, [0.0] * (20 - start), start=start, alarm=alarm(), **collapsed)
        assert tmp_path.joinpath("alarms.log").read_text().splitlines() == lines


class Wandb(types.ModuleType):
    """Stands in for the client: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[int] = []

    def init(self, **settings: Any) -> "Wandb":
        self.inits.append(settings)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self, *, exit_code: int) -> None:
        self.ended.append(exit_code)


def test_wandb_gets_the_recipe_and_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 2):
        client = start_wandb("dinos", tmp_path, {"epochs": 3}, CPU)
        run(tmp_path, [2.0, 4.0], start=start, wandb=client)
    first, second = wandb.inits
    assert (first["project"], first["config"], first["dir"]) == (
        "dinos",
        {"epochs": 3},
        str(tmp_path),
    )
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert [(step, values["loss"]) for step, values in wandb.logged] == [(2, 3.0), (4, 3.0)]
    assert wandb.ended == [0, 0]
    assert start_wandb("dinos", tmp_path, {}, World(1, 2, CPU.device)) is None


def test_wandb_is_left_alone_unless_asked_for_and_named_where_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert start_wandb("", tmp_path, {}, CPU) is None
    with pytest.raises(ConfigError, match="wandb_project = 'dinos': wandb is not installed"):
        start_wandb("dinos", tmp_path, {}, CPU)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Monitor(
        tmp_path, World(1, 2, CPU.device), start=0, stop=1, batch_size=8, every=1
    ) as monitor:
        monitor.step(0, 0, figures(2.0), RATES)
    assert list(tmp_path.iterdir()) == []


def test_the_log_is_a_csv_file_that_other_programs_read(tmp_path: Path) -> None:
    run(tmp_path, [2.0, 4.0])
    with (tmp_path / "log.csv").open(newline="") as file:
        header, row = csv.reader(file)
    assert len(header) == len(row)
