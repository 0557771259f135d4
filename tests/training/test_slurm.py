import os
import subprocess
from pathlib import Path

import pytest

from tests.training.conftest import ROOT
from training.config import ConfigError
from training.distributed import Place, place, world
from training.slurm import SlurmTask, expand_hosts, slurm_task

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node7", ["node7"]),
        ("a,b-2.example.org", ["a", "b-2.example.org"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("a[1-2],b3,c[8,10-11]", ["a1", "a2", "b3", "c8", "c10", "c11"]),
        ("r[1-2]n[08-10]", [f"r{r}n{n}" for r in (1, 2) for n in ("08", "09", "10")]),
        ("gpu[099-101]-ib", ["gpu099-ib", "gpu100-ib", "gpu101-ib"]),
    ],
)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "a[", "a[1-", "a[1-2", "a]1", "a[-2]", "a[x]", "a b", "a[2-1]"]
)
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST"):
        expand_hosts(text)


def test_a_task_of_a_step() -> None:
    task = slurm_task(STEP)
    assert task is not None
    assert task[:4] == (9, 16, 1, "gpu03")
    assert 1024 < task.port < 32768
    other = slurm_task({**STEP, "SLURM_JOB_ID": "1234568"})
    assert other is not None
    assert other.port != task.port


def test_what_the_user_sets_goes_first() -> None:
    task = slurm_task({**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert task == SlurmTask(9, 16, 1, "10.0.0.7", 29500)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"},  # the shell of salloc
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_one_process_stays_one(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slurm_task(environment) is None
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(0, 1, 0)
    with world("cpu") as here:
        assert (here.rank, here.size) == (0, 1)


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"])
@pytest.mark.parametrize("value", [None, "x", "-1"])
def test_variables_that_make_no_sense(name: str, value: str | None) -> None:
    environment = {k: v for k, v in STEP.items() if k != name} | ({name: value} if value else {})
    with pytest.raises(ConfigError, match=name):
        slurm_task(environment)


def test_a_step_without_hosts() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST"):
        slurm_task({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"})


def test_place_of_torchrun_goes_before_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 4, 1)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        place()


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (2, False), (138, True), (140, True), (143, False)]
)
def test_the_batch_script_queues_itself_again_when_its_time_is_up(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    for name, code in (("srun", status), ("scontrol", 0)):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {tmp_path}/said\nexit {code}\n')
        stub.chmod(0o755)
    script = ROOT / "docs" / "slurm" / "pretrain.sbatch"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_CPUS_PER_TASK": "12",
    }
    arguments = ["bash", "-u", str(script), "a recipe.toml", "data.train=x"]
    done = subprocess.run(arguments, env=environment, check=False)
    assert done.returncode == status
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:4] == ["srun", "--cpus-per-task=12", "--kill-on-bad-exit=0", "--wait=120"]
    assert said[5:9] == ["-m", "training.pretrain", "a recipe.toml", "data.train=x"]
    assert said[9:] == (["scontrol", "requeue", "77"] if requeued else [])
