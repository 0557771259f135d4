import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.training.conftest import ROOT, command
from training import snapshot
from training.signals import StopRequest

LOOP = "tests.training.stopping_loop"


def start(arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """A process in a group of its own, so that a test can signal the whole of it."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> int:
    """The process id that a loop writes in its second step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return int(text)
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.02)
    raise TimeoutError(path)


def loop(run_dir: Path, step_s: float = 0.01) -> list[str]:
    run_dir.mkdir(exist_ok=True)
    return [*command(LOOP), str(run_dir), str(step_s)]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_each_signal_ends_a_run_with_a_snapshot_and_its_status(tmp_path: Path) -> None:
    statuses = {
        signal.SIGTERM: 143,
        signal.SIGINT: 130,
        signal.SIGUSR1: 138,
        signal.SIGUSR2: 140,
    }
    running = {each: start(loop(tmp_path / each.name)) for each in statuses}
    for each, process in running.items():
        # The whole group, as a terminal and SLURM do: the loader's workers too.
        os.killpg(wait_for(tmp_path / each.name / "pid-0", process), each)
    for each, process in running.items():
        status, out, err = ended(process)
        assert (status, err) == (statuses[each], "")
        found = snapshot.newest_good(tmp_path / each.name)
        assert found is not None
        assert out == f"stopped by {each.name} after steps [{found.step}]\n"


@pytest.mark.parametrize(("pause_s", "ending"), [(0.2, 143), (1.1, -signal.SIGTERM)])
def test_a_second_sigterm_ends_at_once_unless_it_is_the_first_ones_double(
    pause_s: float, ending: int
) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with StopRequest() as stop:
                os.write(write, b"x")
                time.sleep(pause_s + 0.5)  # a step
                os._exit(stop.status if stop.wanted() else 1)
        finally:
            os._exit(2)
    os.read(read, 1)
    os.kill(child, signal.SIGTERM)
    time.sleep(pause_s)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert os.waitstatus_to_exitcode(status) == ending


def stopped_at(run_dir: Path, out: str, name: str) -> None:
    found = snapshot.newest_good(run_dir)
    assert found is not None
    assert f"stopped by {name} after steps [{found.step}, {found.step}]\n" in out


def test_torchrun_hands_sigterm_on_and_both_ranks_stop_at_one_step(tmp_path: Path) -> None:
    launcher = command("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", LOOP)
    process = start([*launcher, str(tmp_path), "0.01"])
    for rank in (0, 1):
        wait_for(tmp_path / f"pid-{rank}", process)
    os.kill(process.pid, signal.SIGTERM)
    status, out, err = ended(process)
    stopped_at(tmp_path, out, "SIGTERM")
    assert status == 1  # torchrun's own
    assert "forcefully" not in err


def test_tasks_of_srun_find_each_other_and_one_signalled_stops_both(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }
    tasks = [
        start(loop(tmp_path), **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in (0, 1)
    ]
    for rank, task in enumerate(tasks):
        wait_for(tmp_path / f"pid-{rank}", task)
    os.kill(tasks[1].pid, signal.SIGUSR2)
    results = [ended(task) for task in tasks]
    assert [(status, err) for status, _, err in results] == [(140, "")] * 2
    stopped_at(tmp_path, results[0][1], "SIGUSR2")


def test_the_handlers_from_before_come_back() -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    with StopRequest() as stop:
        assert not stop.wanted()
        assert (stop.status, stop.name) == (0, "")
        signal.raise_signal(signal.SIGUSR1)
        assert stop.wanted()
        assert (stop.status, stop.name) == (138, "SIGUSR1")
        signal.raise_signal(signal.SIGTERM)
        assert stop.wanted()
        assert stop.status == 143
    assert {each: signal.getsignal(each) for each in before} == before
