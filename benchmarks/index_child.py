"""What `benchmarks/index.py` measures in processes of their own: a task's name and its JSON.

    python benchmarks/index_child.py fill '{"folder": ..., "vectors": ..., "count": ...}'

Each is fresh, so that its memory is the collection's alone and its start is a start. The last line
that it prints is a JSON object. Memory is anonymous resident memory (RssAnon of /proc/self/status),
less what the process had after its imports: the vectors' file, which is mapped, is none of it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A script's own folder comes first in the path, and index.py there would stand for the package.
sys.path[0] = str(Path(__file__).parents[1])

from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet
from index.kinds import IndexSettings

NAME, MODEL = "vectors", "benchmark"
BATCH = 1000  # records of one upsert
LABELS, NUMBERS = 200, 1000


def main() -> None:
    task, given = sys.argv[1], json.loads(sys.argv[2])
    sys.setswitchinterval(0.0005)  # as `python -m service` does
    print(json.dumps(TASKS[task](**given)))


def numbers_of(start: int, stop: int) -> NDArray[np.int64]:
    """The metadata's "number" of the vectors `start` to `stop` - 1, as good as drawn by lot."""
    mixed = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(NUMBERS)).astype(np.int64)


def fill(
    *, folder: str, vectors: str, count: int, settings: dict[str, Any]
) -> dict[str, float | str]:
    """Writes a collection while nothing is built, then builds its index.

    The collection is `flat` while it is written, which builds nothing, and configured after that.
    """
    source = np.load(vectors, mmap_mode="r")
    base = resident_bytes()
    with CollectionSet(Path(folder)) as collections:
        spaces = {"copy": source.shape[1]}
        flat = IndexSettings(kind="flat")
        collection = collections.create(NAME, spaces=spaces, model=MODEL, settings=flat)
        taken = upsert(collection, source, 0, count)
        with memory_watched() as peak:
            started = time.perf_counter()
            collection.configure(IndexSettings(**settings))
            collection.wait_until_built()
            build_s = time.perf_counter() - started
        stats = collection.stats()
        space = stats.spaces["copy"]
        found: dict[str, float | str] = {
            "ingest_per_s": count / sum(taken),
            "ingest_slowest_batch_s": max(taken),
            "build_s": build_s,
            "build_peak_bytes": peak[0] - base,
            "kind": space.kind,
        }
    return found


def start(
    *, folder: str, queries: str, searches: int = 0, cold: bool = False, wait: bool = False
) -> dict[str, float]:
    """Opens the collections; the time to the first answer, and the memory after `searches`.

    With `cold`, the files come from the disk and not from the system's cache of them. With `wait`,
    also the time until the index is whole.
    """
    asked = np.load(queries)
    if cold:
        forget_pages(Path(folder))
    base = resident_bytes()
    started = time.perf_counter()
    with CollectionSet(Path(folder)) as collections:
        collection = collections.get(NAME)
        opened_s = time.perf_counter() - started
        collection.search(asked[0], k=10, space="copy")
        found = {"opened_s": opened_s, "first_answer_s": time.perf_counter() - started}
        if wait:
            collection.wait_until_built()
            found["built_s"] = time.perf_counter() - started
        for i in range(searches):
            collection.search(asked[i % len(asked)], k=10, space="copy")
        found["memory_bytes"] = resident_bytes() - base
        found["told_memory_bytes"] = collection.stats().memory_bytes
    return found


def grow(*, folder: str, vectors: str, queries: str, count: int, more: int) -> dict[str, float]:
    """Writes into the collection while its index takes in what comes, alone and under searches."""
    source, asked = np.load(vectors, mmap_mode="r"), np.load(queries)
    base = resident_bytes()
    with CollectionSet(Path(folder)) as collections, memory_watched() as peak:
        collection = collections.get(NAME)
        collection.search(asked[0], k=10, space="copy")
        collection.wait_until_built()
        calm = latencies(collection, asked, lambda done: done >= len(asked))
        taken = upsert(collection, source, count, count + more)
        collection.wait_until_built()
        is_written, is_done = threading.Event(), threading.Event()
        under_search: list[float] = []

        def write() -> None:
            try:
                under_search.extend(upsert(collection, source, count + more, count + 2 * more))
                is_written.set()
                collection.wait_until_built()
            finally:  # whoever searches would never end
                is_written.set()
                is_done.set()

        thread = threading.Thread(target=write)
        thread.start()
        writing = latencies(collection, asked, lambda done: is_written.is_set())
        building = latencies(collection, asked, lambda done: is_done.is_set())
        thread.join()
    found = {
        "ingest_while_building_per_s": more / sum(taken),
        "ingest_while_searched_per_s": more / sum(under_search),
        "peak_bytes": peak[0] - base,
    }
    for name, each in (("calm", calm), ("writing", writing), ("building", building)):
        found[f"{name}_searches"] = len(each)
        if each:
            found |= {f"{name}_{key}": value for key, value in in_ms(each).items()}
            found[f"{name}_max_ms"] = 1e3 * max(each)
    return found


def upsert(collection: Collection, source: Any, begin: int, end: int) -> list[float]:
    """Writes the vectors `begin` to `end` - 1 in batches; seconds of each call, and of no more."""
    taken = []
    for first in range(begin, end, BATCH):
        last = min(first + BATCH, end)
        vectors = np.array(source[first:last])
        records = [
            NewRecord(
                f"picture-{first + i:08d}.jpg",
                {"copy": vector},
                {"label": f"n{(first + i) % LABELS:08d}", "number": number},
            )
            for i, (vector, number) in enumerate(
                zip(vectors, numbers_of(first, last).tolist(), strict=True)
            )
        ]
        before = time.perf_counter()
        collection.upsert(records)
        taken.append(time.perf_counter() - before)
    return taken


def latencies(
    collection: Collection, asked: Any, is_enough: Callable[[int], bool]
) -> Sequence[float]:
    """Seconds of one search after the other, until it is enough."""
    taken: list[float] = []
    while not is_enough(len(taken)):
        before = time.perf_counter()
        collection.search(asked[len(taken) % len(asked)], k=10, space="copy")
        taken.append(time.perf_counter() - before)
    return taken


def in_ms(taken: Sequence[float]) -> dict[str, float]:
    return {
        "p50_ms": 1e3 * float(np.median(taken)),
        "p99_ms": 1e3 * float(np.quantile(taken, 0.99)),
    }


def forget_pages(folder: Path) -> None:
    """Let the system's cache of the folder's files go, so that they come from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status tells no RssAnon")


@contextmanager
def memory_watched() -> Iterator[list[int]]:
    """Looks at the resident memory ten times a second: [the most that it was], in bytes."""
    peak, is_over = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.1):
            peak[0] = max(peak[0], resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"fill": fill, "start": start, "grow": grow}

if __name__ == "__main__":
    main()
