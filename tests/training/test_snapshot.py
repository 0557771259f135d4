import errno
import os
import random
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from training import snapshot
from training.snapshot import Damaged, NotWritten, SnapshotError, load, newest_good, path_of, save


def state(step: int, numbers: int = 500) -> dict[str, Any]:
    weights = torch.full((numbers,), float(step))
    return {"step": step, "student": {"w": weights}, "recipe": {"seed": 1, "train": ["a", "b"]}}


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "snapshots").iterdir())


def flip(path: Path, place: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 7, state(7))
    assert path == path_of(tmp_path, 7)
    assert snapshot.latest(tmp_path) == (7, path)
    found = newest_good(tmp_path)
    assert found is not None
    assert (found.step, found.path, found.warnings) == (7, path, ())
    assert torch.equal(found.state["student"]["w"], torch.full((500,), 7.0))
    assert found.state["recipe"] == {"seed": 1, "train": ["a", "b"]}


def test_a_run_without_snapshots(tmp_path: Path) -> None:
    assert newest_good(tmp_path) is None
    assert snapshot.latest(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        load(path_of(tmp_path, 1))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, step, state(step), keep=keep)
    assert names(tmp_path) == [f"step_{step:09d}.pt" for step in range(6 - keep, 6)]


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        save(tmp_path, 1, state(1), keep=0)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1))
    (tmp_path / "snapshots" / "step_000000002.pt.partial").write_bytes(b"half")
    (tmp_path / "snapshots" / "notes.txt").write_text("mine")
    save(tmp_path, 3, state(3))
    assert names(tmp_path) == ["notes.txt", "step_000000001.pt", "step_000000003.pt"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose_the_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_weight(path: Path) -> None:
    where = path.read_bytes().index(torch.full((9,), 3.0).numpy().tobytes())
    flip(path, where + 2)


@pytest.mark.parametrize("damage", [truncate, lose_the_last_byte, empty, flip_a_weight])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, damage: Any) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, state(step), keep=3)
    damage(path_of(tmp_path, 3))
    with pytest.raises(Damaged, match=r"step_000000003\.pt"):
        load(path_of(tmp_path, 3))
    found = newest_good(tmp_path)
    assert found is not None
    assert found.step == found.state["step"] == 2
    (said,) = found.warnings
    assert str(path_of(tmp_path, 3)) in said
    assert str(path_of(tmp_path, 2)) in said

    # The run goes on from 2: its next snapshot is the newest one then, and the damaged one gone.
    save(tmp_path, 2, state(2), keep=1)
    assert names(tmp_path) == ["step_000000002.pt"]


def test_all_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        empty(save(tmp_path, step, state(step)))
    with pytest.raises(SnapshotError, match="every snapshot") as caught:
        newest_good(tmp_path)
    assert all(str(path_of(tmp_path, step)) in str(caught.value) for step in (1, 2))


def test_any_flipped_bit_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(1, numbers=20))
    rng = random.Random(5)
    size = path.stat().st_size
    for place in range(0, size, 3):
        bit = rng.randrange(8)
        flip(path, place, bit)
        with pytest.raises(Damaged):
            load(path)
        flip(path, place, bit)
    assert load(path)["step"] == 1


def test_a_whole_file_that_holds_code_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"step": 1, "student": Path("x")})
    with pytest.raises(SnapshotError, match="not a snapshot") as caught:
        load(path)
    assert "weights_only" not in str(caught.value)


def test_another_mapping_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="not a snapshot"):
        load(save(tmp_path, 1, {"weights": torch.ones(3)}))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process end at `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_grow_leaves_the_old_snapshots(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step))
    with largest_file(10_000), pytest.raises(NotWritten) as caught:
        save(tmp_path, 3, state(3, numbers=100_000))
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert str(path_of(tmp_path, 3)) in str(caught.value)
    assert names(tmp_path) == ["step_000000001.pt", "step_000000002.pt"]
    save(tmp_path, 4, state(4))  # the next try
    assert names(tmp_path) == ["step_000000002.pt", "step_000000004.pt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dinoscope-test", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_the_old_snapshots(small_disk: Path) -> None:
    save(small_disk, 1, state(1, numbers=150_000))
    with pytest.raises(NotWritten, match=os.strerror(errno.ENOSPC)):
        save(small_disk, 2, state(2, numbers=150_000))
    assert names(small_disk) == ["step_000000001.pt"]
    found = newest_good(small_disk)
    assert found is not None
    assert found.step == 1
    save(small_disk, 3, state(3))
    assert names(small_disk) == ["step_000000001.pt", "step_000000003.pt"]


def test_a_newest_snapshot_that_cannot_be_read_at_all_gives_way(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1))
    path_of(tmp_path, 2).mkdir()  # as a failing disk, it raises an OSError and no other
    found = newest_good(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step_000000002.pt' is damaged" in found.warnings[0]
