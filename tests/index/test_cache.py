import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.cache import (
    CachedIndex,
    CacheUnusable,
    cache_bytes,
    read_cache,
    remove_caches,
    write_cache,
)
from index.errors import StoreFailed
from tests.index.helpers import REPOSITORY

DESCRIBED = {"collection": "5d1e", "metric": "cosine", "dimension": 384, "faiss": "1.12.0"}
NUMBERS = np.array([1, 2, 5, 2**40])
WHOLE = {"cls.1.ann", "cls.1.rows", "cls.json"}


def saving(content: bytes) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        path.write_bytes(content)

    return save


def write(folder: Path, generation: int = 1, space: str = "cls", **changes: Any) -> int:
    given = {
        "save": saving(b"a structure" * 100),
        "numbers": NUMBERS,
        "kind": "hnsw",
        "effort": 64,
        "described": DESCRIBED,
    }
    return write_cache(folder, space, generation=generation, **(given | changes))


def read(folder: Path, space: str = "cls") -> CachedIndex | None:
    return read_cache(folder, space, described=DESCRIBED)


def generation_in(folder: Path) -> int | None:
    found = read(folder)
    return found.generation if found else None


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "index").iterdir()}


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert cache_bytes(tmp_path) == 0
    written = write(tmp_path, described=DESCRIBED | {"shape": (1, 2)})
    assert written == cache_bytes(tmp_path) > 1100
    cached = read_cache(tmp_path, "cls", described=DESCRIBED | {"shape": (1, 2)})
    assert cached is not None
    assert cached.path.read_bytes() == b"a structure" * 100
    assert cached.numbers.dtype == np.int64
    assert cached.numbers.tolist() == NUMBERS.tolist()
    assert (cached.generation, cached.kind, cached.effort) == (1, "hnsw", 64)
    assert cached.described == DESCRIBED | {"shape": [1, 2]}


def test_a_new_generation_takes_the_place_of_the_old(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 7, save=saving(b"newer"), numbers=np.arange(0))
    assert files(tmp_path) == {"cls.7.ann", "cls.7.rows", "cls.json"}
    cached = read(tmp_path)
    assert cached is not None
    assert cached.path.read_bytes() == b"newer"
    assert len(cached.numbers) == 0
    for not_newer in (6, 7):
        with pytest.raises(ValueError, match=f"greater than 7, not {not_newer}"):
            write(tmp_path, not_newer)
    assert generation_in(tmp_path) == 7


def test_spaces_do_not_meet(tmp_path: Path) -> None:
    for space in ("cls", "cls-2", "cls2"):
        write(tmp_path, 1, space, save=saving(space.encode()))
    write(tmp_path, 2)
    remove_caches(tmp_path, "cls")
    assert read(tmp_path) is None
    for space in ("cls-2", "cls2"):
        cached = read(tmp_path, space)
        assert cached is not None
        assert cached.path.read_bytes() == space.encode()
    (tmp_path / "index" / "cls-2.5.ann.new").write_bytes(b"left by a crash")
    remove_caches(tmp_path)
    assert files(tmp_path) == set()
    remove_caches(tmp_path / "without")


def test_a_file_that_is_mapped_outlives_its_generation(tmp_path: Path) -> None:
    write(tmp_path, 1, save=saving(np.arange(9.0).tobytes()))
    cached = read(tmp_path)
    assert cached is not None
    mapped = np.memmap(cached.path, dtype=np.float64, mode="r")
    write(tmp_path, 2)
    assert not cached.path.exists()
    assert mapped.tolist() == list(range(9))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metric": "l2"}, 'with metric "cosine", and metric is "l2"'),
        ({"collection": "77aa"}, 'collection "5d1e", and collection is "77aa"'),
        ({"dimension": 384.5}, "dimension 384, and dimension is 384.5"),
        ({"faiss": "1.13.0"}, "faiss"),
        ({"links": 32}, "links null, and links is 32"),
    ],
)
def test_what_was_built_otherwise_is_refused_by_field(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write(tmp_path)
    with pytest.raises(CacheUnusable) as raised:
        read_cache(tmp_path, "cls", described=DESCRIBED | changes)
    assert reason in raised.value.reason
    fewer = {field: value for field, value in DESCRIBED.items() if field != "metric"}
    with pytest.raises(CacheUnusable, match='metric "cosine", and metric is null'):
        read_cache(tmp_path, "cls", described=fewer)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_every_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    path = tmp_path / "index" / name
    whole, chance = path.read_bytes(), random.Random(name)
    for place in chance.sample(range(len(whole)), min(len(whole), 200)):
        changed = bytearray(whole)
        changed[place] ^= chance.randint(1, 255)
        path.write_bytes(changed)
        with pytest.raises(CacheUnusable, match="damaged" if name != "cls.json" else "manifest"):
            read(tmp_path)
    path.write_bytes(whole)
    assert generation_in(tmp_path) == 1


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_files_that_are_cut_or_longer_or_gone(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    path = tmp_path / "index" / name
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CacheUnusable, match="bytes, not" if name != "cls.json" else "manifest"):
            read(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheUnusable):
        read(tmp_path)
    path.unlink()
    if name == "cls.json":
        assert read(tmp_path) is None
    else:
        with pytest.raises(CacheUnusable, match=f"{name} is missing"):
            read(tmp_path)
    path.mkdir()
    with pytest.raises(CacheUnusable):
        read(tmp_path)
    path.rmdir()
    write(tmp_path, 2)  # whatever there was, the next generation is whole
    assert generation_in(tmp_path) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{}", b'{"manifest": 1}', b"\xff" * 99, b"[" * 200_000, b"1" * 9999],
    ids=lambda content: content[:15].decode(errors="replace"),
)
def test_a_manifest_from_elsewhere(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "index" / "cls.json").write_bytes(content)
    with pytest.raises(CacheUnusable, match="manifest is damaged"):
        read(tmp_path)


def test_a_manifest_of_another_space_or_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 3, "other")
    (tmp_path / "index" / "other.json").rename(tmp_path / "index" / "cls.json")
    with pytest.raises(CacheUnusable, match="that of space 'other'"):
        read(tmp_path)
    remove_caches(tmp_path)
    with monkeypatch.context() as newer:
        newer.setattr("index.cache._FORMAT", 2)
        write(tmp_path)
    with pytest.raises(CacheUnusable, match="has format 2, expected 1"):
        read(tmp_path)


def test_what_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    def leave(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(StoreFailed, match="'cls' could not be written to disk: No space left"):
        write(tmp_path, 2, save=fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, save=leave)
    with pytest.raises(TypeError):
        write(tmp_path, 2, described={"collection": object()})
    with pytest.raises(ValueError, match=r"one dimension, not the shape \(2, 2\)"):
        write(tmp_path, 2, numbers=np.ones((2, 2)))
    assert files(tmp_path) == WHOLE
    assert generation_in(tmp_path) == 1
    with pytest.raises(StoreFailed, match="No such file"):
        write(tmp_path / "deleted meanwhile", 2)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_step_that_fails_leaves_a_whole_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write(tmp_path, 1)
    real, left = getattr(os, call), [0]

    def failing(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, os.strerror(5))
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    failures = 0
    for generation in range(2, 99):
        left[0] = generation - 1
        before = generation_in(tmp_path)
        try:
            write(tmp_path, generation)
            break
        except StoreFailed as error:
            failures += "Input/output error" in str(error)
        assert generation_in(tmp_path) in (before, generation)
        assert not any(name.endswith(".new") for name in files(tmp_path))
    assert failures == {"fsync": 5, "rename": 2, "replace": 1}[call]
    assert len(files(tmp_path)) == 3


def test_files_reach_the_disk_before_their_names_and_the_manifest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    log: list[str] = []
    real_fsync, real_unlink = os.fsync, os.unlink

    def fsync(descriptor: int) -> None:
        log.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_fsync(descriptor)

    def moving(real: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def move(source: Path, target: Path) -> None:
            log.append(f"name {Path(target).name}")
            real(source, target)

        return move

    def unlink(path: Path) -> None:
        log.append("remove")
        real_unlink(path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moving(os.rename))
    monkeypatch.setattr(os, "replace", moving(os.replace))
    monkeypatch.setattr(os, "unlink", unlink)
    write(tmp_path, 2)
    assert log == [
        "sync cls.2.ann.new",
        "name cls.2.ann",
        "sync cls.2.rows.new",
        "name cls.2.rows",
        "sync index",
        "sync cls.json.new",
        "name cls.json",
        "sync index",
        "remove",
        "remove",
    ]


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from index.cache import write_cache
from index.errors import StoreFailed
folder, size, rows = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for limit in (100_000, 10**9):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_cache(folder, "cls", save=lambda path: path.write_bytes(bytes(size)) and None,
                    numbers=np.arange(rows), kind="hnsw", effort=1,
                    described={"metric": "l2"}, generation=2)
        print("written")
    except StoreFailed as error:
        print(error, sorted(path.name for path in (folder / "index").iterdir()))
"""


@pytest.mark.parametrize(("size", "rows"), [(100_001, 1), (10, 12_500)])
def test_a_limit_on_file_size_in_a_real_process(tmp_path: Path, size: int, rows: int) -> None:
    # 12,500 rows are 100,000 bytes and a header: only the last bytes do not fit.
    write(tmp_path, 1)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(size), str(rows)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    failed, then = done.stdout.splitlines()
    assert "could not be written to disk: File too large" in failed
    assert failed.endswith(str(sorted(WHOLE)))
    assert then == "written"


def test_kills_at_random_moments_leave_a_whole_generation(tmp_path: Path) -> None:
    kills = 40
    command = [sys.executable, "-m", "tests.index.killed_cache_writer", str(tmp_path), str(kills)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == kills
    before = 0
    for generation, acknowledged in found:
        at_least = max(before, acknowledged)
        assert at_least <= generation <= at_least + 1
        before = generation
    assert found[-1][0] > kills // 2  # they did write


def test_what_a_crash_left_is_cleared_before_it_is_in_the_way(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in ("cls.2.ann", "cls.2.rows.new", "cls.0.rows", "cls.json.new"):
        (tmp_path / "index" / name).write_bytes(b"x")
    seen = []
    write(tmp_path, 3, save=lambda path: (seen.append(files(tmp_path)), saving(b"y")(path))[1])
    assert seen == [WHOLE]


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = json.loads((tmp_path / "index" / "cls.json").read_text())["manifest"]
    assert manifest["described"] == DESCRIBED
    assert manifest["files"].keys() == {"ann", "rows"}
    assert manifest["count"] == 4
