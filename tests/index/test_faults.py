"""Every write path on a disk that fails; the scenarios are in fault_scenarios.py."""

import errno
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from index.collection_set import CollectionSet
from index.errors import StoreFailed
from index.kinds import IndexSettings
from index.maintenance import BuildPolicy
from tests.index.fault_scenarios import batch, batches_in
from tests.index.faulty_disk import build, run_on
from tests.index.helpers import create

FULL, BROKEN = errno.ENOSPC, errno.EIO
WAL, MAIN = "collection.sqlite-wal$", "collection.sqlite$"
STEPS = [("write", FULL), ("torn", FULL), ("write", BROKEN), ("sync", BROKEN), ("create", FULL)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("disk"))


def run(
    library: Path, root: Path, scenario: str, faults: Sequence[tuple[str, int]], pattern: str
) -> list[str]:
    """The lines that are printed."""
    root.mkdir()
    arguments = [str(each) for call, number in faults for each in (call, number, pattern)]
    return run_on(library, root, "tests.index.fault_scenarios", scenario, *arguments).splitlines()


def test_a_write_that_fails(library: Path, root: Path) -> None:
    full = "collection 'pictures': database or disk is full"
    broken = "collection 'pictures': disk I/O error"
    reasons = {
        ("write", FULL): full,
        ("torn", FULL): full,
        ("write", BROKEN): broken,
        ("torn", BROKEN): broken,
        ("sync", BROKEN): broken,
        ("sync", FULL): broken,
    }
    assert run(library, root, "writing", list(reasons), WAL) == list(reasons.values())


def test_a_write_that_fails_and_a_kill(library: Path, root: Path) -> None:
    faults = [(call, BROKEN) for call in ("write", "torn", "sync")]
    # After the last its pages are in the log, whole: that they reach the disk was all the doubt.
    expected = ["[0]", "[0]", "[0, 1]"]
    assert run(library, root, "failed_and_then_killed", faults, WAL) == expected


def test_faults_under_many_writers(library: Path, root: Path) -> None:
    run(library, root, "many_writers", [("torn", FULL), ("sync", BROKEN)], WAL)


def test_a_checkpoint_that_fails_loses_nothing(library: Path, root: Path) -> None:
    run(library, root, "checkpoints", [("write", FULL), ("sync", BROKEN)], MAIN)


def test_an_index_that_cannot_be_saved(library: Path, root: Path) -> None:
    faults = [*STEPS, ("rename", BROKEN)]
    told = run(library, root, "saving", faults, "/index/")
    assert len(told) >= len(faults)
    for line in told:
        assert "could not be written to disk: " in line
        assert line.endswith("; it is tried again in 0 s")


def test_a_snapshot_that_cannot_be_taken(library: Path, root: Path) -> None:
    faults = [*STEPS, ("rename", BROKEN)]
    told = run(library, root, "snapshots", faults, "/.snapshots/")
    assert len(told) == len(faults)
    assert all("collection 'pictures'" in line for line in told)


def test_a_restore_that_fails(library: Path, root: Path) -> None:
    assert len(run(library, root, "restoring", STEPS, "/.new-")) == len(STEPS)


@pytest.mark.parametrize(
    ("scenario", "pattern"), [("opening", "/LOCK"), ("opening_one", "/pictures/")]
)
def test_what_cannot_be_opened(library: Path, root: Path, scenario: str, pattern: str) -> None:
    told = run(library, root, scenario, [("write", FULL), ("write", BROKEN)], pattern)
    assert len(told) == 2
    assert all("collection" in line for line in told)


def test_a_collection_that_cannot_be_made(library: Path, root: Path) -> None:
    assert len(run(library, root, "creating", STEPS, "/.new-")) == len(STEPS)


def test_an_export_that_cannot_be_written(library: Path, root: Path) -> None:
    pytest.importorskip("pyarrow")
    run(library, root, "exporting", STEPS, "/exports/")


def test_writes_that_are_taken_in_parts(library: Path, root: Path) -> None:
    run(library, root, "short_writes", [("short", BROKEN)], "/")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "dinoscope-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs leave to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    root, ballast = small_disk / "collections", small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    policy = BuildPolicy(save_rows=1, save_share=0)
    with CollectionSet(root, policy=policy) as collections:
        collection = create(collections)
        collection.configure(IndexSettings(kind="hnsw"))
        written = 0
        with pytest.raises(StoreFailed, match=r"'pictures'.*(full|I/O)"):  # noqa: PT012
            for number in range(10_000):
                collection.upsert(batch(number))
                written += 1
        assert written > 10
        with pytest.raises(StoreFailed, match=r"full|No space left"):
            collections.snapshot("pictures")
        assert collection.wait_until_built(timeout_s=60)
        assert batches_in(collection) == set(range(written))
        ballast.unlink()
        collection.upsert(batch(written))
        assert batches_in(collection) == set(range(written + 1))
    with CollectionSet(root, policy=policy) as collections:
        assert batches_in(collections.get("pictures")) == set(range(written + 1))
