"""Memory on large pages holds what it held; where the system has them, it is on them."""

import mmap
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from index.ann import Ann
from index.kinds import IndexSettings
from index.large_pages import use_large_pages
from index.one_query import Live

_MIB = 2**20


def on_large_pages() -> int:
    """Bytes of this process's memory that lie on large pages."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return 1024 * int(found[1])


def system_has_them() -> bool:
    """Whether pages are moved when asked: Linux 6.1, unless it is told never to."""
    version = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return version >= (6, 1) and offered.exists() and "[never]" not in offered.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_what_is_moved_stays_what_it_is() -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # numpy asks for large pages by itself
    rows = np.frombuffer(mmap.mmap(-1, 64 * _MIB, flags=flags), np.uint8)
    rows[:] = np.random.default_rng(0).integers(256, size=len(rows), dtype=np.uint8)
    before = rows.copy()
    at = on_large_pages() if system_has_them() else 0
    assert use_large_pages(rows.ctypes.data, rows.nbytes)
    np.testing.assert_array_equal(rows, before)
    if system_has_them():
        assert on_large_pages() > at  # all of it, but where the memory is in pieces


@pytest.mark.parametrize("size", [0, 1, 4096, 2 * _MIB])
def test_what_is_too_small_is_left_alone(size: int) -> None:
    rows = np.zeros(4 * _MIB, np.uint8)
    inside = rows.ctypes.data + 1
    assert use_large_pages(inside, size, should_stop=lambda: pytest.fail("some of it was moved"))


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_it_can_be_stopped_and_done_again() -> None:
    rows = np.ones(200 * _MIB, np.uint8)
    answers = iter([False, True])
    was_done = use_large_pages(rows.ctypes.data, rows.nbytes, should_stop=lambda: next(answers))
    assert was_done is not system_has_them()  # stopped after the first of its pieces
    assert use_large_pages(rows.ctypes.data, rows.nbytes)
    assert rows.all()


def test_a_graph_answers_as_before_and_grows_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((20_000, 256), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    settings = IndexSettings(ef_construction=16)
    ann = Ann.train("hnsw", 256, "cosine", settings, None, expected_rows=10_000)
    ann.add(vectors[:10_000])
    whole = Live(np.full(1250, 255, np.uint8), 10_000)
    found = [ann.search_one(query, 5, whole) for query in vectors[:50]]
    ann.settle()
    assert None not in found
    assert [ann.search_one(query, 5, whole) for query in vectors[:50]] == found
    ann.add(vectors[10_000:])  # moves everything elsewhere
    ann.settle(should_stop=lambda: True)
    ann.settle()
    ann.save(tmp_path / "graph")
    again = Ann.load(tmp_path / "graph", "hnsw", "cosine", structure=ann.structure)
    again.settle()
    for one in (ann, again):
        _, positions = one.search(vectors[:500], 1)
        assert (positions[:, 0] == np.arange(500)).mean() > 0.99
