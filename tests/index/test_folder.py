import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from index.errors import StoreFailed
from index.folder import LOCK_FILE, OwnedFolder
from tests.index.helpers import REPOSITORY


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[OwnedFolder]:
    opened = OwnedFolder(tmp_path / "root")
    yield opened
    opened.release()


def make(folder: OwnedFolder, name: str, content: str) -> None:
    with folder.making(name) as made:
        (made / "file").write_text(content)


def replace(folder: OwnedFolder, name: str, content: str) -> None:
    with folder.replacing(name) as made:
        (made / "file").write_text(content)


def content(folder: OwnedFolder, name: str = "a") -> str:
    return (folder.root / name / "file").read_text()


def entries(folder: OwnedFolder) -> list[str]:
    return sorted(path.name for path in folder.root.iterdir())


def reopened(folder: OwnedFolder) -> OwnedFolder:
    folder.release()
    return OwnedFolder(folder.root)


def test_a_replacement_takes_the_name_of_the_old_or_of_none(folder: OwnedFolder) -> None:
    replace(folder, "a", "first")
    assert content(folder) == "first"
    with folder.replacing("a") as made:
        (made / "file").write_text("second")
        assert content(folder) == "first"
        assert folder.subfolders() == [made.name, "a"]
        assert not made.name[0].isalnum()
    assert content(folder) == "second"
    assert entries(folder) == [LOCK_FILE, "a"]


def test_a_block_that_fails_changes_nothing(folder: OwnedFolder) -> None:
    make(folder, "a", "first")

    def fail(name: str, error: BaseException) -> None:
        with folder.replacing(name) as made:
            (made / "file").write_text("second")
            raise error

    with pytest.raises(StoreFailed, match="'a' could not be replaced: No space left"):
        fail("a", OSError(28, os.strerror(28)))
    with pytest.raises(KeyboardInterrupt):
        fail("b", KeyboardInterrupt())
    assert content(folder) == "first"
    assert entries(folder) == [LOCK_FILE, "a"]
    folder.release()
    with pytest.raises(RuntimeError, match="has been closed"):
        replace(folder, "a", "second")


@pytest.mark.parametrize("call", ["rename", "fsync"])
@pytest.mark.parametrize("there_is_an_old_one", [True, False])
def test_a_step_that_fails_leaves_one_of_the_two_for_good(
    folder: OwnedFolder, monkeypatch: pytest.MonkeyPatch, call: str, there_is_an_old_one: bool
) -> None:
    real, calls = getattr(os, call), list[int]()

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise OSError(5, os.strerror(5))
        return real(*arguments)

    failures = 0
    for nth in range(1, 20):
        if there_is_an_old_one:
            make(folder, "a", "old")
        with monkeypatch.context() as faulty:
            faulty.setattr(os, call, failing)
            calls.clear()
            try:
                replace(folder, "a", "new")
            except StoreFailed:
                failures += 1
        is_done = len(calls) < nth
        seen = content(folder) if folder.has("a") else None
        assert seen in ({"new"} if is_done else {"old" if there_is_an_old_one else None, "new"})
        # Nobody may go on with one and find the other after a restart.
        folder = reopened(folder)
        assert (content(folder) if folder.has("a") else None) == seen
        assert entries(folder) == [LOCK_FILE, *(["a"] if seen else [])]
        if is_done:
            break
        if seen:
            folder.remove("a")
    assert failures == {"rename": 3, "fsync": 4}[call] - 2 * (not there_is_an_old_one)
    folder.release()


STOPPED = """
import os, shutil, sys
from pathlib import Path
from index.folder import OwnedFolder
folder, left = OwnedFolder(Path(sys.argv[1])), int(sys.argv[2])
def counting(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*arguments, **options)
    return call
for module, name in ((os, "rename"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree")):
    setattr(module, name, counting(getattr(module, name)))
with folder.replacing("a") as made:
    (made / "file").write_text("new")
"""


@pytest.mark.parametrize("there_is_an_old_one", [True, False])
def test_a_crash_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, there_is_an_old_one: bool
) -> None:
    def run(steps: int) -> tuple[int, str]:
        root = tmp_path / str(steps)
        folder = OwnedFolder(root)
        if there_is_an_old_one:
            make(folder, "a", "old")
        make(folder, "b", "other")
        folder.release()
        command = [sys.executable, "-c", STOPPED, str(root), str(steps)]
        code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
        folder = OwnedFolder(root)
        assert content(folder, "b") == "other"
        found = content(folder) if folder.has("a") else "none"
        assert entries(folder) == [LOCK_FILE, *(["a"] if found != "none" else []), "b"]
        folder.release()
        return code, found

    old, steps = ("old", 9) if there_is_an_old_one else ("none", 4)
    seen = [run(number) for number in range(steps + 1)]
    assert [code for code, _ in seen] == [9] * steps + [0]
    found = [each for _, each in seen]
    assert found == sorted(found, key=[old, "new"].index)
    assert set(found) == {old, "new"}


def test_what_was_replaced_does_not_come_back_with_the_next_removal(
    folder: OwnedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(folder, "a", "old")
    # As a crash between the last two steps leaves it, without the restart.
    (folder.root / "a").rename(folder.root / ".replaced-a")
    make(folder, "a", "new")
    folder.remove("a")
    folder = reopened(folder)
    assert entries(folder) == [LOCK_FILE]
    folder.release()


def test_what_cannot_be_cleared_now_is_cleared_at_the_next_start(
    folder: OwnedFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(folder, "a", "old")

    def refuse(path: Path) -> None:
        raise PermissionError(13, os.strerror(13))

    with monkeypatch.context() as refusing, caplog.at_level(logging.WARNING):
        refusing.setattr(shutil, "rmtree", refuse)
        replace(folder, "a", "new")
    assert "will be cleared at the next start" in caplog.text
    assert content(folder) == "new"
    assert len(entries(folder)) == 3
    folder = reopened(folder)
    assert entries(folder) == [LOCK_FILE, "a"]
    folder.release()


def test_a_link_to_a_folder_elsewhere_is_replaced_and_its_target_left(
    folder: OwnedFolder, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("old")
    (folder.root / "a").symlink_to(tmp_path / "elsewhere")
    replace(folder, "a", "new")
    assert content(folder) == "new"
    assert entries(folder) == [LOCK_FILE, "a"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "old"


def test_other_hidden_folders_are_left_alone(folder: OwnedFolder) -> None:
    (folder.root / ".snapshots").mkdir()
    (folder.root / ".snapshots" / "file").write_text("kept")
    folder = reopened(folder)
    assert content(folder, ".snapshots") == "kept"
    folder.release()
