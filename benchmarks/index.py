"""The index beside bare FAISS, hnswlib and a scan by numpy, on the same vectors and in one run.

    python benchmarks/index.py [--json] [--plot docs/index-growth.png]
    python benchmarks/index.py --sizes 10000 --kind hnsw --vectors my/vectors.npy

For each size, in this order:

- A process of its own writes a collection, by upserts of 1,000 records with metadata, while it is
  `flat` and builds nothing (`ingest_per_s`, the calls alone), then has its index built (`build_s`).
- Another opens it, with its files out of the page cache, and searches (`cold_start_s`,
  `memory_ratio` to the raw vectors); up to 100,000 vectors also without the index on disk.
- This one opens it, and builds bare FAISS's index with the same parameters, and hnswlib's. Queries
  that are not in the collection are asked one at a time on one thread; rounds take turns, and each
  is told by its fastest. `Collection.search` also reads ids and metadata. The others' effort is the
  least whose recall@10 is at least ours (`vs_faiss`: our p50 over bare FAISS's).
- Searches with filters that pass 50%, 5% and .1% of the records.
- A process writes a tenth more (20,000 at most) while the index takes it in, then as many under
  searches: how long these wait (`growing`).

`index_vectors.py` tells what the vectors are, and shows that they lie as real ones do. What was
found at the largest size stands on the JSON's first level, all of it under `sizes`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A scan by numpy gets one core, as every single query does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import faiss
import numpy as np

# A script's own folder comes first in the path, and this file would stand for the package.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.index_child import NAME, in_ms, numbers_of
from benchmarks.index_vectors import (
    Floats,
    Maker,
    compare,
    in_blocks,
    normalised,
    real_vectors,
    recall_of,
    true_nearest,
)
from index.collection import Collection
from index.collection_set import CollectionSet
from index.kinds import IndexSettings

K = 10  # neighbours
KEPT = {"50%": 500, "5%": 50, "0.1%": 1}  # of the 1,000 numbers in the metadata
FIRST = ("recall_at_10", "p50_ms", "vs_faiss", "ingest_per_s", "cold_start_s", "memory_ratio")
REBUILT_UP_TO = 100_000
MOST_GROWTH = 20_000

Find = Callable[[Floats, int], Any]
"""Queries [q, dimension] at unit length and an effort -> the positions of K neighbours [q, K]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="*.tar.gz")
    parser.add_argument("--sample", type=int, default=20_000, help="pictures to embed")
    parser.add_argument("--cache", type=Path, default=Path("build/index-benchmark"))
    parser.add_argument(
        "--vectors", type=Path, help="real vectors [n, d], .npy, in place of --data"
    )
    parser.add_argument("--folder", type=Path, help="where collections are made, and then removed")
    parser.add_argument("--kind", default="auto", choices=["auto", "flat", "hnsw"])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="+", default=[], choices=["faiss", "hnswlib", "numpy"])
    parser.add_argument("--plot", type=Path, help="draws the growth from size to size")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.sizes.sort()
    if options.vectors is not None:
        real = np.load(options.vectors)
    elif options.data.is_dir():
        real = real_vectors(options.data, options.sample, options.cache)
    else:
        parser.error(f"{options.data} is not there: give --data FOLDER or --vectors FILE.npy")
    found: dict[str, Any] = {
        "settings": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "cores": len(os.sched_getaffinity(0)),
        "vectors": compare(real),
        "sizes": {},
    }
    say("vectors", found["vectors"])
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder, largest = Path(made), options.sizes[-1]
        maker = Maker(real)
        maker.write(folder / "vectors.npy", largest + 2 * growth(largest))
        np.save(folder / "queries.npy", maker.queries(options.queries))
        for size in options.sizes:
            found["sizes"][str(size)] = measure(options, folder, size)
    found |= {name: found["sizes"][str(largest)][name] for name in FIRST}
    if options.plot:
        draw(found, options.plot)
    if options.json:
        print(json.dumps(found))


def growth(size: int) -> int:
    return min(MOST_GROWTH, size // 10)


def measure(options: argparse.Namespace, folder: Path, size: int) -> dict[str, Any]:
    """All figures of one size."""
    began, home = time.perf_counter(), folder / "collections"
    files = {"folder": str(home), "queries": str(folder / "queries.npy")}
    source = {"folder": str(home), "vectors": str(folder / "vectors.npy"), "count": size}
    settings = IndexSettings(kind=options.kind)
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")[:size]
    raw = vectors.nbytes
    found: dict[str, Any] = child("fill", **source, settings=settings.to_dict())
    found["build_peak_ratio"] = found["build_peak_bytes"] / raw
    found["disk_bytes"] = {
        "records": sum(p.stat().st_size for p in home.rglob("*.sqlite*")),
        "index": sum(p.stat().st_size for p in home.rglob("index/*")),
    }
    found["disk_ratio"] = sum(found["disk_bytes"].values()) / raw
    opened = child("start", **files, searches=100, cold=True)
    found["cold_start_s"] = opened["first_answer_s"]
    found["warm_start_s"] = child("start", **files)["first_answer_s"]
    found["memory_ratio"] = opened["memory_bytes"] / raw
    if size <= REBUILT_UP_TO and (home / NAME / "index").exists():
        shutil.rmtree(home / NAME / "index")
        rebuilt = child("start", **files, cold=True, wait=True)
        found["start_without_cache_s"] = rebuilt["first_answer_s"]
        found["rebuilt_after_s"] = rebuilt["built_s"]
    asked = np.load(folder / "queries.npy")
    found |= compete(options, home, vectors, asked, settings)
    more = growth(size)
    found["growing"] = child("grow", **source, queries=files["queries"], more=more)
    found["growing"]["peak_ratio"] = found["growing"]["peak_bytes"] / raw / (1 + 2 * more / size)
    shutil.rmtree(home)
    found["all_s"] = time.perf_counter() - began
    say(f"{size} vectors", found)
    return found


def child(task: str, **given: Any) -> Any:
    """What a task of `index_child.py` found, in a process of its own."""
    script = Path(__file__).with_name("index_child.py")
    arguments = [sys.executable, str(script), task, json.dumps(given)]
    ended = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{task} ended with status {ended.returncode}")
    found = json.loads(ended.stdout.splitlines()[-1])
    say(task, found)
    return found


def compete(
    options: argparse.Namespace, home: Path, vectors: Floats, asked: Floats, settings: IndexSettings
) -> dict[str, Any]:
    """Searches of ours and of the others, beside the truth."""
    unit, size = normalised(asked), len(vectors)
    numbers = numbers_of(0, size)
    some = unit[: max(1, len(unit) // 5)]
    truth = true_nearest(vectors, unit, K)
    found: dict[str, Any] = {}
    with CollectionSet(home) as collections:
        collection = collections.get(NAME)
        collection.wait_until_built()
        space = collection.stats().spaces["copy"]
        found["effort"], found["told_recall"] = space.effort, space.recall

        def own(queries: Floats, effort: int) -> Any:
            return [ids(collection.search(each, k=K, space="copy")) for each in queries]

        found["recall_at_10"] = recall_of(truth, own(unit, 0))
        rivals, found["rivals"] = make_rivals(options.skip, vectors, space.kind, settings)
        efforts = {"ours": 0}
        for name, find in rivals.items():
            few = slice(20) if name == "numpy" else slice(None)
            effort = least_effort(find, unit[few], truth[few], found["recall_at_10"])
            efforts[name] = found["rivals"][name]["effort"] = effort
            recall = recall_of(truth[few], find(unit[few], effort))
            found["rivals"][name]["recall_at_10"] = recall
        competitors: dict[str, Find] = {"ours": own, **rivals}
        faiss.omp_set_num_threads(1)
        told = race(options.rounds, competitors, efforts, unit)
        found |= told.pop("ours")
        for name, each in told.items():
            found["rivals"][name] |= each
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
        batches: dict[str, Callable[[], Any]] = {
            name: lambda n=name: rivals[n](unit, efforts[n]) for name in rivals if name != "numpy"
        }
        batches["ours"] = lambda: collection.search_batch(unit, K, "copy")
        for name, batch in batches.items():  # each takes all cores
            per_s = len(unit) / min(seconds(batch) for _ in range(options.rounds))
            (found if name == "ours" else found["rivals"][name])["batch_per_s"] = per_s
        bare = found["rivals"].get("faiss")
        found["vs_faiss"] = found["p50_ms"] / bare["p50_ms"] if bare else None
        found["filtered"] = {}
        for name, kept in KEPT.items():
            nearest = true_nearest(vectors, some, K, numbers < kept)
            found["filtered"][name] = filtered(collection, some, nearest, kept)
    return found


def filtered(collection: Collection, asked: Floats, truth: Any, kept: int) -> dict[str, float]:
    """Searches that let `kept` of 1,000 numbers pass; the first reads metadata into memory."""
    chosen = {"must": {"key": "number", "range": {"lt": kept}}}
    taken, found = [], []
    for query in asked:
        before = time.perf_counter()
        found.append(ids(collection.search(query, k=K, space="copy", filter=chosen)))
        taken.append(time.perf_counter() - before)
    return {
        "recall_at_10": recall_of(truth, found),
        "first_ms": 1e3 * taken[0],
        **in_ms(taken[1:] or taken),
    }


def race(
    rounds: int, competitors: dict[str, Find], efforts: dict[str, int], unit: Floats
) -> dict[str, dict[str, float]]:
    """p50 and p99 in ms of single queries, and queries/s of 1 and 8 threads, by the best round."""
    best: dict[str, dict[str, float]] = {name: {} for name in competitors}
    for _ in range(rounds):
        for name, find in competitors.items():
            own = unit[:20] if name == "numpy" else unit
            effort, taken = efforts[name], []
            for i in range(len(own)):
                before = time.perf_counter()
                find(own[i : i + 1], effort)
                taken.append(time.perf_counter() - before)
            told = in_ms(taken)
            told["per_s_1_thread"] = len(own) / sum(taken)
            told["per_s_8_threads"] = len(own) / seconds(
                lambda f=find, e=effort, o=own: eight(f, e, o)
            )
            for key, value in told.items():
                better = min if key.endswith("_ms") else max
                best[name][key] = better(value, best[name].get(key, value))
    return best


def eight(find: Find, effort: int, queries: Floats) -> None:
    def ask(first: int) -> None:
        for i in range(first, len(queries), 8):
            find(queries[i : i + 1], effort)

    with ThreadPoolExecutor(8, initializer=lambda: faiss.omp_set_num_threads(1)) as pool:
        list(pool.map(ask, range(8)))


def make_rivals(
    skipped: Sequence[str], vectors: Floats, kind: str, settings: IndexSettings
) -> tuple[dict[str, Find], dict[str, dict[str, Any]]]:
    """The others, filled with the same vectors at unit length, and how long that took."""
    makers = {"faiss": bare_faiss, "hnswlib": bare_hnswlib, "numpy": numpy_scan}
    rivals, found = {}, {}
    for name, make in makers.items():
        if name in skipped:
            continue
        try:
            started = time.perf_counter()
            rivals[name] = make(vectors, kind, settings)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        found[name] = {} if name == "numpy" else {"build_s": time.perf_counter() - started}
        say(name, found[name])
    return rivals, found


def bare_faiss(vectors: Floats, kind: str, settings: IndexSettings) -> Find:
    dimension = vectors.shape[1]
    if kind != "hnsw":
        flat = faiss.IndexFlatIP(dimension)
        for rows in in_blocks(vectors):
            flat.add(rows)
        return lambda queries, effort: flat.search(queries, K)[1]
    index = faiss.IndexHNSWFlat(dimension, settings.hnsw_m, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = settings.ef_construction
    for rows in in_blocks(vectors):
        index.add(rows)
    return lambda queries, effort: index.search(
        queries, K, params=faiss.SearchParametersHNSW(efSearch=effort)
    )[1]


def bare_hnswlib(vectors: Floats, kind: str, settings: IndexSettings) -> Find:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(
        len(vectors), M=settings.hnsw_m, ef_construction=settings.ef_construction, random_seed=1
    )
    for rows in in_blocks(vectors):
        index.add_items(rows)

    def find(queries: Floats, effort: int) -> Any:
        index.set_ef(max(effort, K))
        return index.knn_query(queries, K, num_threads=1)[0].astype(np.int64)

    return find


def numpy_scan(vectors: Floats, kind: str, settings: IndexSettings) -> Find:
    matrix = normalised(vectors)

    def find(queries: Floats, effort: int) -> Any:
        scores = queries @ matrix.T
        return np.argpartition(-scores, K - 1, axis=1)[:, :K]  # in no order

    return find


def least_effort(find: Find, unit: Floats, truth: Any, wanted: float) -> int:
    """The least effort of which recall is at least as wanted, or 2048."""
    low, high = K, 2048
    if recall_of(truth, find(unit, low)) >= wanted:
        return low
    while low < high:
        middle = (low + high) // 2
        if recall_of(truth, find(unit, middle)) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


def ids(matches: Sequence[Any]) -> list[int]:
    return [int(match.id[8:16]) for match in matches]


def seconds(run: Callable[[], Any]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def say(title: str, found: dict[str, Any]) -> None:
    print(f"{title}:", file=sys.stderr)
    for key, value in found.items():
        print(f"    {key}: {shown(value)}", file=sys.stderr)


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(found: dict[str, Any], path: Path) -> None:
    """Growth from size to size, a panel for each figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [int(size) for size in found["sizes"]]
    each = list(found["sizes"].values())
    beside = {"bare FAISS": "faiss", "hnswlib": "hnswlib", "numpy scan": "numpy"}
    panels = [
        ("one query, p50 (ms)", "p50_ms", True),
        ("queries/s, 8 threads", "per_s_8_threads", True),
        ("recall@10", "recall_at_10", False),
        ("building (s)", "build_s", True),
        ("memory / raw vectors", "memory_ratio", False),
        ("durable ingest (vectors/s)", "ingest_per_s", False),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (title, key, is_log) in zip(axes.flat, panels, strict=True):
        lines = {"dinoscope": [at[key] for at in each]}
        for label, name in beside.items():
            lines[label] = [at["rivals"].get(name, {}).get(key) for at in each]
        for label, values in lines.items():
            points = [(s, v) for s, v in zip(sizes, values, strict=True) if v is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=title, xscale="log", xlabel="vectors")
        axis.set_yscale("log" if is_log else "linear")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
