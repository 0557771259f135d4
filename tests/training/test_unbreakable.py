"""Whole runs, killed, stopped, damaged, streamed, sharded: each ends as if it had not been."""

import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.conftest import (
    TINY_RECIPE,
    command,
    finish,
    log_rows,
    start,
    toml,
    write_pictures,
)
from training import snapshot
from training.pretrain import main

STEPS = 24  # 16 pictures in batches of 4, 6 epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pictures and a recipe with everything that has a state: drop paths, fp32, several workers."""
    folder = tmp_path_factory.mktemp("unbreakable")
    write_pictures(folder / "pictures", 16)
    table = {**TINY_RECIPE, "epochs": 6, "report": {"every_epochs": 0, "pictures": 0}}
    table["model"] = {**TINY_RECIPE["model"], "drop_path_rate": 0.2}
    table["data"] = {"train": str(folder / "pictures"), "workers": 1}
    (folder / "recipe.toml").write_text(toml(table))
    yield folder
    shutil.rmtree(folder)


def arguments(folder: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [str(folder / "recipe.toml"), f"run_dir={run_dir}", *overrides]


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return command("training.pretrain")
    run = command("torch.distributed.run", f"--nproc-per-node={processes}", "--standalone")
    return [*run, "-m", "training.pretrain"]


def losses(run_dir: Path) -> list[str]:
    rows = log_rows(run_dir)
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def state(run_dir: Path) -> dict[str, dict[str, Tensor]]:
    found = snapshot.newest_good(run_dir)
    assert found is not None
    return found.state


def assert_same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    ours, theirs = state(one), state(other)
    for part in ("student", "teacher", "loss", "loss_scale"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    torch.testing.assert_close(
        ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0
    )


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Until the log has a row of that step, or the process has ended."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        log = run_dir / "log.csv"
        if log.exists() and log.read_text().count("\n") > step:
            return
        time.sleep(0.01)


def run_to_the_end(processes: int, rest: list[str]) -> None:
    if processes == 1:
        assert main(rest) == 0
        return
    status, _, err = finish([*launcher(processes), *rest])
    assert status == 0, err


def kill_everything(process: subprocess.Popen[str], run_dir: Path) -> None:
    """SIGKILL for the launcher, and for every process that it started for this run."""
    process.kill()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(run_dir).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    process.communicate()


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ["snapshot_steps=3"]),
        (1, ["snapshot_steps=3", "precision=fp16", "optimizer.name=sgd"]),
        (2, ["snapshot_steps=4", "batch_size=2"]),
        (2, ["snapshot_steps=4", "batch_size=1", "accumulation=2", "strategy=fsdp"]),
    ],
    ids=["one", "fp16", "ddp", "fsdp"],
)
def test_a_run_that_is_killed_is_the_run_that_was_not(
    folder: Path, tmp_path: Path, processes: int, overrides: list[str]
) -> None:
    """SIGKILL at a random step, mid-epoch or not; then the same command once more."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_the_end(processes, arguments(folder, whole, *overrides))
    assert len(losses(whole)) == STEPS
    at = random.Random(f"{processes}{overrides}").randrange(5, STEPS - 10)
    process = start([*launcher(processes), *arguments(folder, killed, *overrides)])
    wait_for_step(process, killed, at)
    kill_everything(process, killed)
    assert process.returncode == -signal.SIGKILL
    found = snapshot.newest_good(killed)
    assert found is not None
    assert 0 < found.step < STEPS
    run_to_the_end(processes, arguments(folder, killed, *overrides))
    assert_same(killed, whole)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR2, 140)], ids=["TERM", "USR2"]
)
def test_a_signal_writes_a_snapshot_first(
    folder: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    run_dir = tmp_path / "run"
    rest = arguments(folder, run_dir, "snapshot_steps=1000", "epochs=200")
    process = start([*launcher(1), *rest])
    wait_for_step(process, run_dir, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    found = snapshot.newest_good(run_dir)
    assert found is not None
    assert f"stopped after step {found.step}" in err
    assert len(losses(run_dir)) == found.step
    shutil.rmtree(tmp_path)


def test_two_processes_stop_at_the_same_step(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    rest = arguments(folder, run_dir, "snapshot_steps=1000", "epochs=500", "batch_size=2")
    process = start([*launcher(2), *rest])
    wait_for_step(process, run_dir, 3)
    process.terminate()  # torchrun hands it on
    _, err = process.communicate(timeout=120)
    found = snapshot.newest_good(run_dir)
    assert found is not None, err
    assert found.step >= 3
    assert f"SIGTERM: stopped after step {found.step}" in err
    shutil.rmtree(tmp_path)


def test_a_damaged_newest_snapshot_gives_way_to_the_one_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    assert main(arguments(folder, whole, "snapshot_steps=10")) == 0
    shutil.copytree(whole, damaged)
    newest = damaged / "snapshots" / f"step_{STEPS:09d}.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    newest.write_bytes(content)
    capsys.readouterr()
    assert main(arguments(folder, damaged, "snapshot_steps=10")) == 0
    err = capsys.readouterr().err
    assert f"{newest.name}' is damaged; going on from" in err
    assert "step 20" in err
    assert_same(damaged, whole)
    shutil.rmtree(tmp_path)


def test_a_stream_is_resumed_exactly(folder: Path, tmp_path: Path) -> None:
    shards = []
    for i in range(3):
        path = tmp_path / f"shard-{i}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name in sorted((folder / "pictures").iterdir())[i::3]:
                tar.add(name, arcname=name.name)
        shards.append(str(path))
    overrides = [f"data.train={shards}".replace("'", '"'), "data.stream=true", "data.workers=2"]
    overrides += ["data.shuffle_buffer=4", "snapshot_steps=7"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(arguments(folder, whole, *overrides)) == 0
    shutil.copytree(whole, cut)
    (cut / "snapshots" / f"step_{STEPS:09d}.pt").unlink()
    assert main(arguments(folder, cut, *overrides)) == 0
    assert_same(cut, whole)
    assert main(arguments(folder, cut, *overrides, "data.workers=1")) == 2  # another order
    shutil.rmtree(tmp_path)


def test_the_same_seed_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for run_dir, seed in zip(runs, (3, 3, 4), strict=True):
        assert main(arguments(folder, run_dir, f"seed={seed}", "epochs=2")) == 0
    assert_same(runs[0], runs[1])
    assert losses(runs[0]) != losses(runs[2])
    shutil.rmtree(tmp_path)


def test_a_full_disk_stops_nothing_but_the_end(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise snapshot.NotWritten("snapshot could not be written: No space left on device")

    monkeypatch.setattr("training.snapshot.save", full)
    run_dir = tmp_path / "run"
    assert main(arguments(folder, run_dir, "snapshot_steps=20")) == 2
    err = capsys.readouterr().err
    assert err.count("warning: snapshot could not be written") == 1  # at step 20
    assert "error: snapshot could not be written" in err  # at the end
    assert len(losses(run_dir)) == STEPS


def test_a_dry_run_tells_and_draws_and_trains_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*arguments(folder, run_dir), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "memory", "16 pictures", "teacher_momentum", "crops.png"):
        assert word in out
    assert [path.name for path in run_dir.iterdir()] == ["crops.png"]
    assert os.environ.get("RANK") is None


def test_a_dry_run_looks_at_the_weights_to_start_from(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in (("dino_vits99", "did you mean"), ("nosuch.pth", "neither a file")):
        run_dir = tmp_path / name
        assert main([*arguments(folder, run_dir, f"init_from={name}"), "--dry-run"]) == 2
        assert told in capsys.readouterr().err
        assert not (run_dir / "crops.png").exists()


def test_a_run_from_another_runs_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(folder, first, "epochs=2")) == 0
    capsys.readouterr()
    frozen = ["epochs=2", "teacher.momentum=1.0"]
    assert main(arguments(folder, second, f"init_from={first}", *frozen)) == 0
    assert f"init_from {first}" in capsys.readouterr().err
    torch.testing.assert_close(state(second)["teacher"], state(first)["teacher"], rtol=0, atol=0)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.architecture=resnet18", "crops.global_size=32", "crops.local_size=32",
         "head.batch_norm=true", "optimizer.name=lars"],
        ["data.channels=1", "data.mean=[0.4]", "data.std=[0.2]"],
        ["data.channels=4", "data.augment=device"],
        ["compile=false", "checkpoint_blocks=true", "model.patch_size=5"],
        ["loss.assignment=sinkhorn_knopp", "loss.centering=false", "head.predictor=true"],
    ],
    ids=["resnet", "grey", "rgba on the device", "patch 5, recomputed", "sinkhorn, predictor"],
)  # fmt: skip
def test_other_networks_and_pictures(folder: Path, tmp_path: Path, overrides: list[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(folder, run_dir, "epochs=2", *overrides)) == 0
    assert len(losses(run_dir)) == 8
    shutil.rmtree(tmp_path)
