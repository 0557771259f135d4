"""Real tasks of one run, told of each other as srun does, when one of them or a disk fails."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, TINY_RECIPE, command, log_rows, toml, write_pictures

StartTask = Callable[[int, int], subprocess.Popen[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures", 16)
    table = {**TINY_RECIPE, "epochs": 500, "report": {"every_epochs": 0, "pictures": 0}}
    table["data"] = {"train": str(tmp_path / "pictures"), "workers": 0}
    (tmp_path / "recipe.toml").write_text(toml(table))
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def start_task(folder: Path) -> Iterator[StartTask]:
    """Starts the task of a rank, at a port; what still runs at the end is killed."""
    with ExitStack() as running:

        def start(rank: int, port: int) -> subprocess.Popen[str]:
            process = running.enter_context(task(folder, rank, port))
            running.callback(process.kill)
            return process

        yield start


def task(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    step = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [*command("training.pretrain"), str(folder / "recipe.toml"), f"run_dir={folder / 'run'}"],
        cwd=ROOT,
        env={**own, **step, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_both(folder: Path, start_task: StartTask) -> list[subprocess.Popen[str]]:
    """Two tasks that have trained a few steps together."""
    port = free_port()
    tasks = [start_task(rank, port) for rank in (0, 1)]
    log = folder / "run" / "log.csv"
    deadline = time.monotonic() + 200
    while not log.exists() or len(log_rows(log.parent)) < 3:
        ended = [task.communicate()[1] for task in tasks if task.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return tasks


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_task_ends_the_other_in_words(
    folder: Path, start_task: StartTask, killed: int
) -> None:
    tasks = start_both(folder, start_task)
    tasks[killed].kill()
    tasks[killed].communicate()
    left = 1 - killed
    _, err = tasks[left].communicate(timeout=120)
    assert tasks[left].returncode == 1, err
    assert f"error: rank {left} of 2 ends, because another process is gone" in err
    assert "the same command goes on from the newest snapshot" in err
    assert "Traceback" not in err


def test_a_signals_snapshot_that_cannot_be_written_fails_on_every_task(
    folder: Path, start_task: StartTask
) -> None:
    """Else srun, which takes the highest status, would tell of a run that stopped well."""
    (folder / "run").mkdir()
    (folder / "run" / "snapshots").write_text("in the folder's place")
    tasks = start_both(folder, start_task)
    tasks[1].send_signal(signal.SIGUSR2)
    for task in tasks:
        _, err = task.communicate(timeout=120)
        assert task.returncode == 2, err
        assert "error: " in err
        assert "could not" in err
        assert "Traceback" not in err


def test_a_port_that_is_taken_is_named(start_task: StartTask, taken_port: int) -> None:
    task = start_task(0, taken_port)
    _, err = task.communicate(timeout=120)
    assert task.returncode == 2, err
    assert f"error: rank 0 of 2 finds no others at localhost:{taken_port}" in err
    assert "MASTER_PORT" in err
    assert "Traceback" not in err
