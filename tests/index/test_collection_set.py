import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from index.collection_set import CollectionSet
from index.errors import (
    CollectionExists,
    CollectionNotFound,
    InvalidName,
    InvalidVector,
    ModelMismatch,
    StoreDamaged,
    StoreFailed,
    StoreInUse,
)
from index.folder import OwnedFolder
from index.store import FILE_NAME, Store
from tests.index.helpers import MODEL, REPOSITORY, SPACES, create, fill, record, vectors


def run(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(root)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_collections_are_made_found_and_listed(collections: CollectionSet) -> None:
    assert collections.names() == []
    made = create(collections, "b")
    create(collections, "a")
    assert collections.get("b") is made
    assert collections.names() == ["a", "b"]
    with pytest.raises(CollectionExists, match="'a'"):
        create(collections, "a")
    with pytest.raises(CollectionNotFound, match=r"'c'.*\['a', 'b'\]"):
        collections.get("c")


def test_get_or_create_wants_the_same_model_and_spaces(collections: CollectionSet) -> None:
    made = collections.get_or_create("a", spaces=SPACES, model=MODEL)
    reordered = dict(reversed(SPACES.items()))
    assert collections.get_or_create("a", spaces=reordered, model=MODEL) is made
    with pytest.raises(ModelMismatch, match=f"{MODEL}.*other"):
        collections.get_or_create("a", spaces=SPACES, model="other")
    with pytest.raises(InvalidVector, match="'cls': 5"):
        collections.get_or_create("a", spaces={"cls": 5}, model=MODEL)


@pytest.mark.parametrize("name", ["", "A", "-a", "_a", "a/b", "..", "a.b", "é", "a" * 64, "a\n", 3])
def test_names_that_cannot_be(collections: CollectionSet, name: Any) -> None:
    with pytest.raises(InvalidName):
        create(collections, name)
    with pytest.raises(InvalidName):
        collections.create("a", spaces={name: 4}, model=MODEL)
    assert collections.names() == []
    create(collections, "a")


@pytest.mark.parametrize("spaces", [{}, {"cls": 0}, {"cls": 4.0}, {"cls": True}, {"cls": 10**6}])
def test_spaces_that_cannot_be(collections: CollectionSet, spaces: Any) -> None:
    with pytest.raises(InvalidVector):
        collections.create("a", spaces=spaces, model=MODEL)


def test_a_model_must_be_named(collections: CollectionSet) -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        collections.create("a", spaces=SPACES, model="")


def test_delete_takes_everything(root: Path, collections: CollectionSet) -> None:
    gone = create(collections, "a")
    fill(gone, 3)
    collections.delete("a")
    assert collections.names() == []
    assert sorted(path.name for path in root.iterdir()) == ["LOCK"]
    with pytest.raises(CollectionNotFound, match="closed or deleted"):
        gone.count()
    with pytest.raises(CollectionNotFound):
        collections.delete("a")
    assert create(collections, "a").count() == 0


def test_a_collection_that_could_not_be_deleted_goes_on(
    collections: CollectionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(create(collections, "a"), 3)

    def refuse(self: OwnedFolder, name: str) -> None:
        raise StoreFailed("no")

    with monkeypatch.context() as patched:
        patched.setattr(OwnedFolder, "remove", refuse)
        with pytest.raises(StoreFailed):
            collections.delete("a")
    assert collections.get("a").count() == 3


def test_what_a_crash_left_is_cleared(root: Path) -> None:
    with CollectionSet(root) as collections:
        fill(create(collections, "a"), 3)
        fill(create(collections, "b"), 3)
    (root / "a").rename(root / ".deleted-123")
    shutil.copytree(root / "b", root / ".new-456")
    with CollectionSet(root) as collections:
        assert collections.names() == ["b"]
        assert sorted(path.name for path in root.iterdir()) == ["LOCK", "b"]
        assert create(collections, "a").count() == 0


def test_a_creation_that_fails_leaves_nothing(
    root: Path, collections: CollectionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, **rest: Any) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "create", fail)
        with pytest.raises(StoreFailed, match=r"'a'.*No space left"):
            create(collections, "a")
    assert [path.name for path in root.iterdir()] == ["LOCK"]
    create(collections, "a")


def test_folders_that_are_no_collections_are_left_alone(root: Path) -> None:
    (root / "Photos").mkdir(parents=True)
    (root / "lost+found").mkdir()
    (root / "notes").touch()
    with CollectionSet(root) as collections:
        assert collections.names() == []
        with pytest.raises(CollectionExists):
            create(collections, "notes")
    assert (root / "Photos").is_dir()


def test_one_owner_at_a_time(root: Path, collections: CollectionSet) -> None:
    with pytest.raises(StoreInUse):
        CollectionSet(root)
    code = (
        "import sys, pathlib, index.collection_set as c; c.CollectionSet(pathlib.Path(sys.argv[1]))"
    )
    other = run(root, code)
    assert other.returncode == 1
    assert "StoreInUse" in other.stderr.splitlines()[-1]
    assert "in use by process" in other.stderr
    collections.close()
    collections.close()
    assert run(root, code + ".close()").returncode == 0
    with pytest.raises(RuntimeError, match="closed"):
        create(collections)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_one_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def garble_all(path: Path) -> None:
    path.write_bytes(b"\xa5" * path.stat().st_size)


def garble_within(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def change(statement: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()

    apply.__name__ = statement
    return apply


DAMAGES = [
    truncate,
    cut_one_page,
    garble_all,
    garble_within,
    empty,
    Path.unlink,
    change("PRAGMA user_version = 99"),
    change("DELETE FROM vectors_0 WHERE row = 2"),
    change("UPDATE vectors_1 SET vector = x'00' WHERE row = 2"),
    change("UPDATE vectors_1 SET vector = zeroblob(24) WHERE row = 2"),
    change("DELETE FROM collection"),
    change("DROP TABLE vectors_1"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_reported_and_stays_with_its_collection(
    root: Path, damage: Callable[[Path], None]
) -> None:
    with CollectionSet(root) as collections:
        fill(create(collections, "bad"), 300)
        fill(create(collections, "good"), 3)
    damage(root / "bad" / FILE_NAME)
    with CollectionSet(root) as collections:
        assert collections.names() == ["bad", "good"]
        assert list(collections.damaged) == ["bad"]
        assert collections.get("good").search(vectors(1)["cls"], k=1)[0].id == "r1"
        with pytest.raises(StoreDamaged, match=r"'bad' cannot be read.*backup"):
            collections.get("bad")
        with pytest.raises(StoreDamaged):
            collections.get_or_create("bad", spaces=SPACES, model=MODEL)
        with pytest.raises(CollectionExists):
            create(collections, "bad")
        collections.delete("bad")
        assert create(collections, "bad").upsert([record("a")])[0].outcome == "created"


def test_damage_that_shows_later_is_reported_too(root: Path) -> None:
    with CollectionSet(root) as collections:
        fill(create(collections), 3)
    change("UPDATE records SET metadata = 'nonsense' WHERE id = 'r1'")(
        root / "pictures" / FILE_NAME
    )
    with CollectionSet(root) as collections:
        collection = collections.get("pictures")
        assert collection.get("r0").metadata == {"number": 0}
        with pytest.raises(StoreDamaged, match="metadata"):
            collection.get("r1")
        (match,) = collection.search(vectors(1)["cls"], k=1)
        assert match.id == "r1"
        with pytest.raises(StoreDamaged, match="metadata"):
            _ = match.metadata


def test_a_snapshots_path(collections: CollectionSet) -> None:
    fill(create(collections), 1)
    made = collections.snapshot("pictures")
    assert collections.snapshot_path("pictures", made.name).stat().st_size == made.bytes


def test_whatever_page_is_lost_the_others_open(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each half of a page overwritten in turn: reported, or none of a search's business."""
    with CollectionSet(root) as collections:
        fill(create(collections, "bad"), 300)
        fill(create(collections, "good"), 3)
    path = root / "bad" / FILE_NAME
    whole = path.read_bytes()
    reported = 0
    for start in range(0, len(whole), 4096):
        path.write_bytes(whole[:start] + bytes(4096) + whole[start + 4096 :])
        with CollectionSet(root) as collections:
            assert collections.get("good").count() == 3
            if "bad" in collections.damaged:
                reported += 1
                continue
            collection = collections.get("bad")
            for use in (
                lambda own=collection: own.search(vectors(1)["cls"], k=300),
                lambda own=collection: own.scroll(limit=300, with_vectors=True),
                lambda own=collection: own.count({"must": {"key": "number", "exists": True}}),
                lambda own=collection: own.upsert([record(f"r{i}", i) for i in range(300)]),
                collection.check,
            ):
                with suppress(StoreDamaged):
                    use()
    assert reported > 5
