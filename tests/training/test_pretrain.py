import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from training.config import ConfigError, load_recipe
from training.distributed import World
from training.monitors import COLUMNS
from training.pretrain import main
from training.state import make_training, restore

STEPS = 12  # 12 pictures in batches of 4, 4 epochs


class Run(NamedTuple):
    """A finished run of one process, and what it was made from."""

    pictures: Path
    recipe: Path
    run_dir: Path
    err: str

    def arguments(self, run_dir: Path, *overrides: str) -> list[str]:
        """The arguments of `training.pretrain` for another run of the same kind."""
        return [str(self.recipe), f"data.train={self.pictures}", f"run_dir={run_dir}", *overrides]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("pretrain")
    write_pictures(folder / "pictures", 12)
    (folder / "recipe.toml").write_text(toml(TINY_RECIPE))
    made = Run(folder / "pictures", folder / "recipe.toml", folder / "run", "")
    arguments = made.arguments(made.run_dir, "snapshot_steps=5")
    status, _, err = finish([*command("training.pretrain"), *arguments])
    assert status == 0, err
    yield made._replace(err=err)
    shutil.rmtree(folder)  # snapshots are large


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder for a run of one test's own."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path)


def final_state(run_dir: Path) -> dict[str, dict[str, Tensor]]:
    found = snapshot.latest(run_dir)
    assert found is not None
    assert found[0] == STEPS
    return snapshot.load(found[1])


def steps_of(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in log_rows(run_dir)]


def test_a_run_writes_log_events_recipe_and_snapshots(run: Run) -> None:
    rows = log_rows(run.run_dir)
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [int(row["epoch"]) for row in rows] == [e for e in range(4) for _ in range(3)]
    for row in rows:
        assert all(float(row[name]) >= 0 for name in COLUMNS)
        terms = float(row["teacher_entropy"]) + float(row["kl"])
        assert float(row["loss"]) == pytest.approx(terms, rel=1e-4)
    assert float(rows[2]["lr"]) == pytest.approx(0.02 * 4 / 256)  # the warm-up's end
    assert list((run.run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert (run.run_dir / "recipe.json").is_file()
    kept = sorted(path.name for path in (run.run_dir / "snapshots").iterdir())
    assert kept == ["step_000000010.pt", "step_000000012.pt"]  # of 5, 10 and 12


def test_student_and_teacher_have_moved_apart(run: Run) -> None:
    state = final_state(run.run_dir)
    assert state["student"].keys() == state["teacher"].keys()
    assert not torch.equal(
        state["student"]["backbone.blocks.0.mlp.fc1.weight"],
        state["teacher"]["backbone.blocks.0.mlp.fc1.weight"],
    )
    assert state["loss"]["center"].abs().max() > 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(run: Run, run_dir: Path) -> None:
    arguments = [*command("training.pretrain"), *run.arguments(run_dir, "snapshot_steps=2")]
    first = run_dir / "snapshots" / "step_000000002.pt"
    process = start(arguments)
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    found = snapshot.latest(run_dir)
    assert found is not None
    done = found[0]
    assert 2 <= done < STEPS

    status, _, err = finish(arguments)
    assert status == 0, err
    assert f"steps {done} to {STEPS}" in err
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    losses = [[row["loss"] for row in log_rows(folder)] for folder in (run_dir, run.run_dir)]
    assert losses[0] == losses[1]
    resumed, whole = final_state(run_dir), final_state(run.run_dir)
    for part in ("teacher", "student", "loss"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    for mine, theirs in zip(
        resumed["optimizer"]["state"].values(), whole["optimizer"]["state"].values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_dropped_paths_are_the_same_after_resuming(run: Run, run_dir: Path) -> None:
    overrides = ("epochs=2", "snapshot_steps=4", "model.drop_path_rate=0.3")
    assert main(run.arguments(run_dir, *overrides)) == 0  # 6 steps, snapshots after 4 and 6
    last = run_dir / "snapshots" / "step_000000006.pt"
    whole, losses = snapshot.load(last), [row["loss"] for row in log_rows(run_dir)]
    last.unlink()
    assert main(run.arguments(run_dir, *overrides)) == 0
    assert [row["loss"] for row in log_rows(run_dir)] == losses
    for part in ("teacher", "student", "loss"):
        torch.testing.assert_close(snapshot.load(last)[part], whole[part], rtol=0, atol=0)


def test_steps_that_are_not_finite_stop_the_run_and_leave_its_weights_finite(
    run: Run, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = run.arguments(run_dir, "optimizer.lr=1e30", "log_steps=50", "snapshot_steps=3")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "5 steps in a row had gradients that are not finite" in said
    assert "optimizer.lr" in said
    names = {path.name for path in run.pictures.iterdir()}
    for line in (run_dir / "skipped_steps.rank0.jsonl").read_text().splitlines():
        assert set(json.loads(line)["names"]) <= names
    for path in (run_dir / "snapshots").glob("*.pt"):
        state = snapshot.load(path)
        assert all(w.isfinite().all() for w in state["student"].values())


@pytest.mark.parametrize("where", ["data.augment=device", "data.on_device=true"])
def test_crops_made_on_the_device_give_nearly_the_same_run(
    run: Run, run_dir: Path, where: str
) -> None:
    assert main(run.arguments(run_dir, where)) == 0
    losses = [[float(row["loss"]) for row in log_rows(d)] for d in (run_dir, run.run_dir)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_accumulated_batches_are_one_larger_batch(run: Run, run_dir: Path) -> None:
    assert main(run.arguments(run_dir, "batch_size=2", "accumulation=2")) == 0
    losses = [[float(row["loss"]) for row in log_rows(d)] for d in (run_dir, run.run_dir)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, whole = final_state(run_dir), final_state(run.run_dir)
    for part in ("loss", "teacher"):  # to 1e-5: AdamW makes the key bias of rounding noise
        torch.testing.assert_close(ours[part], whole[part], rtol=1e-4, atol=1e-5)


def test_batch_norm_over_cpu_processes_is_refused(run: Run) -> None:
    recipe = load_recipe(run.recipe, [*run.arguments(run.run_dir)[1:], "head.batch_norm=true"])
    with pytest.raises(ConfigError, match=r"head\.batch_norm = True"):
        make_training(recipe, World(0, 2, torch.device("cpu")))


def test_two_processes_do_what_one_does(run: Run, run_dir: Path) -> None:
    launcher = command("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    status, _, err = finish(
        [*launcher, "training.pretrain", *run.arguments(run_dir, "batch_size=2")]
    )
    assert status == 0, err
    assert "2 process(es)" in err
    for column in ("loss", "teacher_entropy", "kl", "gradient_norm", "lr"):
        two, one = ([float(r[column]) for r in log_rows(d)] for d in (run_dir, run.run_dir))
        assert two == pytest.approx(one, rel=1e-4), column
    two, one = final_state(run_dir), final_state(run.run_dir)
    for part in ("loss", "teacher"):  # to 1e-5: AdamW makes the key bias of rounding noise
        torch.testing.assert_close(two[part], one[part], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_as_it_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def contents() -> dict[str, tuple[int, int]]:
        paths = [run.run_dir / "log.csv", *(run.run_dir / "snapshots").iterdir()]
        return {p.name: (p.stat().st_size, p.stat().st_ino) for p in paths}

    before, state = contents(), final_state(run.run_dir)
    assert main(run.arguments(run.run_dir)) == 0
    assert f"steps {STEPS} to {STEPS}" in capsys.readouterr().err
    assert contents() == before
    for part in ("teacher", "student", "loss"):
        torch.testing.assert_close(final_state(run.run_dir)[part], state[part], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=4", ["seed was 3 and is 4"]),
        ("crops.local_scale=[0.1, 0.2]", ["crops.local_scale was"]),
    ],
)
def test_another_recipe_is_refused_in_the_same_folder(
    run: Run, override: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run.run_dir / "recipe.json").read_text()
    assert main(run.arguments(run.run_dir, override)) == 2
    said = error_line(capsys)
    assert str(run.run_dir) in said
    assert all(word in said for word in words)
    assert (run.run_dir / "recipe.json").read_text() == before


def test_a_snapshot_from_before_a_setting_was_there_goes_on_with_its_default(run: Run) -> None:
    recipe = load_recipe(run.recipe, run.arguments(run.run_dir)[1:])
    here = World(0, 1, torch.device("cpu"))

    def old() -> dict[str, Any]:
        state: dict[str, Any] = final_state(run.run_dir)
        del state["recipe"]["cuda_graph"], state["recipe"]["crops"]["blur"]
        return state

    state = old()
    restore(make_training(recipe, here), state, recipe=recipe, scale=state["scale"])
    changed = load_recipe(run.recipe, [*run.arguments(run.run_dir)[1:], "crops.blur=[0.1, 1.0]"])
    with pytest.raises(snapshot.SnapshotError, match=r"crops\.blur was \[0\.1, 2\.0\] and is"):
        restore(make_training(changed, here), old(), recipe=changed, scale=state["scale"])


def test_another_number_of_pictures_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = run.pictures / "extra.png"
    shutil.copy(run.pictures / "000.png", extra)
    try:
        assert main(run.arguments(run.run_dir)) == 2
    finally:
        extra.unlink()
    assert "pictures was 12 and is 13" in error_line(capsys)


def test_another_number_of_processes_is_refused(run: Run) -> None:
    recipe = load_recipe(run.recipe, run.arguments(run.run_dir)[1:])
    one = World(0, 1, torch.device("cpu"))
    with pytest.raises(snapshot.SnapshotError, match="processes was 1 and is 2"):
        restore(
            make_training(recipe, one),
            final_state(run.run_dir),
            recipe=recipe,
            scale={"pictures": 12, "processes": 2},
        )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that a refusal consists of."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_mistakes_are_one_line_and_status_2(
    run: Run, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert main(arguments) == 2
        return error_line(capsys)

    assert "nowhere.toml" in said("nowhere.toml")
    assert "did you mean 'batch_size'" in said(*run.arguments(run_dir, "batchsize=3"))
    assert "nowhere" in said(*run.arguments(run_dir, "data.train=nowhere"))
    assert "13" in said(*run.arguments(run_dir, "batch_size=13"))
    assert not run_dir.exists()


def test_a_mistake_shows_no_traceback(run: Run, run_dir: Path) -> None:
    arguments = run.arguments(run_dir, "optimizer.name=adam")
    status, out, err = finish([*command("training.pretrain"), *arguments])
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "optimizer.name = 'adam'" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(
    run: Run, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run.arguments(run_dir, "device=cuda")) == 2
    assert "device" in error_line(capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_listed_and_stops_nothing(
    run: Run, run_dir: Path, workers: int
) -> None:
    pictures = run_dir.with_name("broken")
    shutil.copytree(run.pictures, pictures)
    (pictures / "007.png").write_bytes(b"no picture")
    overrides = [f"data.train={pictures}", f"data.workers={workers}"]
    assert main(run.arguments(run_dir, *overrides)) == 0
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    listed = (run_dir / "bad_pictures.rank0.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in listed] == ["name", "007.png"]


def test_a_damaged_snapshot_is_named(
    run: Run, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "snapshots").mkdir(parents=True)
    newest = snapshot.latest(run.run_dir)
    assert newest is not None
    damaged = run_dir / "snapshots" / newest[1].name
    damaged.write_bytes(newest[1].read_bytes()[:100_000])
    assert main(run.arguments(run_dir)) == 2
    said = capsys.readouterr().err
    assert str(damaged) in said
    assert "Traceback" not in said


def test_old_rows_of_the_log_give_way(run: Run, run_dir: Path) -> None:
    """A snapshot older than the log's last row: what is run again is logged once."""
    shutil.copytree(run.run_dir, run_dir)
    newest = snapshot.latest(run_dir)
    assert newest is not None
    newest[1].unlink()
    (run_dir / "snapshots" / "step_000000099.pt.partial").write_bytes(b"half a snapshot")
    assert main(run.arguments(run_dir)) == 0
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
