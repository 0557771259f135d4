import hashlib
import json
import logging
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from index.collection_set import CollectionSet
from index.errors import (
    InvalidName,
    SnapshotDamaged,
    SnapshotNotFound,
    StoreFailed,
)
from index.snapshots import Snapshots
from index.store import FILE_NAME
from tests.index.helpers import REPOSITORY, create, fill, vectors

DESCRIBED = {"count": 3, "model": "sha256:a-model", "spaces": {"cls": 4}}
NOON = 1_795_600_000.25  # 2026-11-25 09:46:40 UTC


def copying(content: bytes) -> Callable[[Path], None]:
    def copy(path: Path) -> None:
        path.write_bytes(content)

    return copy


def take(snapshots: Snapshots, collection: str = "pictures", content: bytes = b"data" * 999) -> str:
    return snapshots.create(collection, copy=copying(content), described=DESCRIBED).name


def names(snapshots: Snapshots, collection: str = "pictures") -> list[str]:
    return [each.name for each in snapshots.list(collection)]


def files(root: Path, collection: str = "pictures") -> list[str]:
    return sorted(path.name for path in (root / ".snapshots" / collection).iterdir())


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def test_a_snapshot_comes_back_after_a_restart(
    snapshots: Snapshots, tmp_path: Path, target: Path
) -> None:
    before = time.time()
    made = snapshots.create("pictures", copy=copying(b"data"), described=DESCRIBED)
    assert before <= made.created_at <= time.time()
    assert made.name == time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(made.created_at))
    assert (made.bytes, made.count, made.model) == (4, 3, "sha256:a-model")
    snapshots = Snapshots(tmp_path)
    assert snapshots.list("pictures") == [made]
    assert snapshots.collections() == ["pictures"]
    assert snapshots.path("pictures", made.name).read_bytes() == b"data"
    snapshots.restore_into("pictures", made.name, target)
    assert [path.name for path in target.iterdir()] == [FILE_NAME]
    assert (target / FILE_NAME).read_bytes() == b"data"


def test_names_are_unique_and_the_list_is_in_their_order(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOON)
    made = [take(snapshots) for _ in range(12)]
    assert made[:2] == ["20261125T094640Z", "20261125T094640Z-2"]
    assert made[-1] == "20261125T094640Z-12"
    monkeypatch.setattr(time, "time", lambda: NOON - 60)
    earlier = take(snapshots)
    assert names(snapshots) == [earlier, *made]


def test_snapshots_made_at_once_are_all_there(snapshots: Snapshots) -> None:
    def make(content: bytes) -> None:
        def copy(path: Path) -> None:
            time.sleep(0.01)  # long enough for another to choose the same name
            path.write_bytes(content)

        snapshots.create("pictures", copy=copy, described=DESCRIBED)

    threads = [threading.Thread(target=make, args=(bytes([number]),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = [snapshots.path("pictures", name).read_bytes() for name in names(snapshots)]
    assert sorted(contents) == [bytes([number]) for number in range(8)]


def test_the_manifest_describes_what_was_copied(snapshots: Snapshots, tmp_path: Path) -> None:
    described: dict[str, Any] = {"model": "m"}

    def copy(path: Path) -> None:
        path.write_bytes(b"data")
        described["count"] = 7

    made = snapshots.create("pictures", copy=copy, described=described)
    assert made.count == 7
    manifest = json.loads((tmp_path / ".snapshots/pictures" / f"{made.name}.json").read_text())
    assert manifest["manifest"]["sha256"] == hashlib.sha256(b"data").hexdigest()
    assert manifest["manifest"]["described"] == {"count": 7, "model": "m"}


def test_what_is_not_there_is_told_with_what_is(snapshots: Snapshots, target: Path) -> None:
    assert snapshots.list("pictures") == []
    with pytest.raises(SnapshotNotFound, match=r"'pictures' has no snapshot 'x'; it has none$"):
        snapshots.path("pictures", "x")
    name = take(snapshots)
    with pytest.raises(SnapshotNotFound, match=rf"no snapshot 'x'; it has \['{name}'\]"):
        snapshots.delete("pictures", "x")
    with pytest.raises(SnapshotNotFound, match=r"'other' has no .*; there are some of \['pict"):
        snapshots.restore_into("other", name, target)
    snapshots.delete("pictures", name)
    assert snapshots.list("pictures") == snapshots.collections() == []
    with pytest.raises(SnapshotNotFound):
        snapshots.delete("pictures", name)


@pytest.mark.parametrize("bad", ["..", "../pictures", "", ".", "/etc", "a/../pictures", "a\0", "*"])
def test_names_are_never_paths(
    snapshots: Snapshots, tmp_path: Path, target: Path, bad: str
) -> None:
    name = take(snapshots)
    (tmp_path / f"{name}.json").write_bytes(b"{}")
    for collection, snapshot in ((bad, name), ("pictures", bad), ("pictures", f"{bad}/{name}")):
        with pytest.raises(SnapshotNotFound):
            snapshots.path(collection, snapshot)
        with pytest.raises(SnapshotNotFound):
            snapshots.delete(collection, snapshot)
        with pytest.raises(SnapshotNotFound):
            snapshots.restore_into(collection, snapshot, target)
    assert snapshots.list(bad) == []
    with pytest.raises(InvalidName):
        take(snapshots, bad)
    assert len(files(tmp_path)) == 2


def test_what_cannot_be_made_leaves_nothing(snapshots: Snapshots, tmp_path: Path) -> None:
    name = take(snapshots)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(StoreFailed, match="'pictures' could not be made: No space left"):
        snapshots.create("pictures", copy=fail, described=DESCRIBED)
    with pytest.raises(KeyboardInterrupt):
        snapshots.create("pictures", copy=interrupt, described=DESCRIBED)
    with pytest.raises(ValueError, match=r"must have 'count' and 'model', it has \['count'\]"):
        snapshots.create("pictures", copy=copying(b""), described={"count": 1})
    with pytest.raises(TypeError):
        snapshots.create("pictures", copy=copying(b""), described=DESCRIBED | {"x": object()})
    assert files(tmp_path) == [f"{name}.json", f"{name}.sqlite"]


def test_a_step_that_fails_leaves_no_half_snapshot(
    snapshots: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(snapshots)
    real, left, failures = os.fsync, [0], 0

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, os.strerror(5))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    while True:
        left[0] = failures + 1
        try:
            take(snapshots)
            break
        except StoreFailed:
            failures += 1
        assert len(names(snapshots)) == 1
        assert len(files(tmp_path)) == 2
    assert failures == 6  # two folders above, the file, its folder, the manifest, its folder
    assert len(names(snapshots)) == 2


STOPPED = """
import os, sys
from pathlib import Path
from index.snapshots import Snapshots
snapshots, left = Snapshots(Path(sys.argv[1])), int(sys.argv[2])
def counting(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*arguments, **options)
    return call
for name in ("fsync", "replace", "unlink", "mkdir"):
    setattr(os, name, counting(getattr(os, name)))
snapshots.create("pictures", copy=lambda path: path.write_bytes(b"second") and None,
                 described={"count": 2, "model": "m"})
snapshots.delete("pictures", sys.argv[3])
"""


def test_a_crash_at_any_step_leaves_whole_snapshots_alone(tmp_path: Path, target: Path) -> None:
    def run(steps: int) -> tuple[int, list[int]]:
        root = tmp_path / str(steps)
        root.mkdir()
        first = take(Snapshots(root), content=b"first")
        command = [sys.executable, "-c", STOPPED, str(root), str(steps), first]
        code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
        snapshots = Snapshots(root)
        found = snapshots.list("pictures")
        for each in found:
            snapshots.restore_into("pictures", each.name, target)
            content = b"first" if each.count == 3 else b"second"
            assert (target / FILE_NAME).read_bytes() == content
            (target / FILE_NAME).unlink()
        assert len(files(root)) == 2 * len(found)
        return code, [each.count for each in found]

    seen = [run(steps) for steps in range(14)]
    assert [code for code, _ in seen] == [9] * 12 + [0] * 2
    # The first alone, both, the second alone: never none.
    counts = [found for _, found in seen]
    assert counts == sorted(counts, key=[[3], [3, 2], [2]].index)
    assert len({tuple(each) for each in counts}) == 3


def test_what_was_left_unfinished_is_cleared_at_the_start(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    name = take(snapshots)
    folder = tmp_path / ".snapshots" / "pictures"
    for left in ("20261122T203100Z.sqlite", "20261122T203100Z-2.json.new", "notes.txt"):
        (folder / left).write_bytes(b"x")
    assert names(snapshots) == [name]
    Snapshots(tmp_path)
    assert files(tmp_path) == [f"{name}.json", f"{name}.sqlite", "notes.txt"]


def test_every_changed_byte_is_noticed(snapshots: Snapshots, tmp_path: Path, target: Path) -> None:
    name, other = take(snapshots), take(snapshots)
    path, chance = snapshots.path("pictures", name), random.Random(0)
    for file in (path, path.with_suffix(".json")):
        whole = file.read_bytes()
        for place in chance.sample(range(len(whole)), 60):
            changed = bytearray(whole)
            changed[place] ^= chance.randint(1, 255)
            file.write_bytes(changed)
            with pytest.raises(SnapshotDamaged, match=rf"'{name}'.*damaged.*\['{other}'\].*recov"):
                snapshots.restore_into("pictures", name, target)
        for size in (0, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(SnapshotDamaged):
                snapshots.restore_into("pictures", name, target)
        file.write_bytes(whole)
    path.unlink()
    with pytest.raises(SnapshotDamaged, match="its file is missing"):
        snapshots.restore_into("pictures", name, target)
    path.mkdir()
    with pytest.raises(SnapshotDamaged, match="cannot be read: Is a directory"):
        snapshots.restore_into("pictures", name, target)
    assert list(target.iterdir()) == []
    snapshots.restore_into("pictures", other, target)


def test_a_damaged_manifest_hides_nothing_else_and_is_not_cleared(
    snapshots: Snapshots, tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, other = take(snapshots), take(snapshots)
    path = snapshots.path("pictures", name)
    path.with_suffix(".json").write_bytes(b"garbage")
    snapshots = Snapshots(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert names(snapshots) == [other]
    assert f"{name!r} of collection 'pictures' is damaged: its manifest is damaged" in caplog.text
    assert path.exists()
    path.with_suffix(".json").write_bytes(
        snapshots.path("pictures", other).with_suffix(".json").read_bytes()
    )
    with pytest.raises(SnapshotDamaged, match=f"its manifest is that of '{other}' of 'pictures'"):
        snapshots.restore_into("pictures", name, target)
    snapshots.delete("pictures", name)
    assert names(snapshots) == [other]


def test_a_restore_that_does_not_fit_leaves_nothing(
    snapshots: Snapshots, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = take(snapshots)
    (target / FILE_NAME).write_bytes(b"precious")
    with pytest.raises(StoreFailed, match=f"'{name}' .* was not restored: File exists"):
        snapshots.restore_into("pictures", name, target)
    assert (target / FILE_NAME).read_bytes() == b"precious"
    (target / FILE_NAME).unlink()

    def fail(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(StoreFailed, match="was not restored: No space left"):
            snapshots.restore_into("pictures", name, target)
    assert list(target.iterdir()) == []
    snapshots.restore_into("pictures", name, target)


def test_a_real_collection_goes_back_and_is_no_collection_itself(root: Path) -> None:
    with CollectionSet(root) as collections:
        snapshots = Snapshots(root)
        collection = create(collections)
        fill(collection, 20)
        made = snapshots.create(
            "pictures",
            copy=collection._store.database.backup,
            described={"count": collection.count(), "model": collection.model},
        )
        # Looking into a snapshot, as the module's docstring says, leaves it as it is.
        uri = f"{snapshots.path('pictures', made.name).as_uri()}?immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as looking:
            assert looking.execute("SELECT count(*) FROM records").fetchone() == (20,)
        collection.delete([f"r{number}" for number in range(15)])
        assert collection.count() == 5
        collection.close()
        with collections._folder.replacing("pictures") as folder:
            snapshots.restore_into("pictures", made.name, folder)
    with CollectionSet(root) as collections:
        assert collections.names() == ["pictures"]
        assert collections.get("pictures").count() == 20
        assert collections.get("pictures").search(vectors(7)["cls"], k=1)[0].id == "r7"
        collections.delete("pictures")
    with CollectionSet(root) as collections:
        assert collections.names() == []
        with collections._folder.replacing("pictures") as folder:
            Snapshots(root).restore_into("pictures", made.name, folder)
    with CollectionSet(root) as collections:
        assert collections.get("pictures").count() == 20
