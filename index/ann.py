"""Nearest neighbours in memory, all of it to be had again from the store. Alone imports faiss.

Scores: greater is nearer. They are inner products for the metrics `cosine` (whose vectors come here
at unit length) and `ip`, and for `l2` minus the squared distance.

Threads: faiss lets go of the interpreter lock, so searches run side by side on the threads that
call, each on that one thread; additions use as many as OpenMP was started with.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from index.effort import candidates_kept, efforts, exact_is_cheaper, lists_probed
from index.growth import GrowingVector, parts_of_graph
from index.hits import Hits, best_hits, is_filled, no_hits, put_hits
from index.index_file import write_index
from index.inverted import inverted_file, search_lists
from index.kinds import IndexSettings, Kind, Metric, is_trained, lists_for
from index.locks import Pace, ReadWriteLock
from index.one_query import Live, OneQuery

faiss: Any = _faiss  # its type stubs lack half of what is used here

# How long, in seconds, additions aim to keep searches waiting; the stated bound is .05, on a
# machine whose cores are not all taken by others.
HOLD_S = 0.02

_ROWS_A_HOLD = 65_536
# hnsw: faiss adds on one core where no more than 100 vectors of a call are of one level.
_PARALLEL_FROM = 112
_POINTS_A_LIST = 39  # the fewest that faiss's k-means takes without a complaint

Search = Callable[[NDArray[np.float32]], Hits]


def search_block(
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    k: int,
    metric: Metric,
    allowed: NDArray[np.bool_] | None = None,
) -> Hits:
    """The k nearest of `vectors` [m, d] to each of `queries` [q, d], exactly.

    `vectors` is read where it stands (a slice of whole rows is good). `allowed` [m] leaves out the
    rows that are False. Positions are rows of `vectors`.
    """
    queries, vectors = _matrix(queries), _matrix(vectors)
    scores, positions = no_hits(len(queries), k)
    selector = None if allowed is None else _bitmap(allowed)
    width = min(k, len(vectors))
    if not width:
        return scores, positions
    # Of 20 queries or more at once faiss takes l2 through |x|² + |y|² - 2xy, which cancels.
    step = 16 if metric == "l2" else max(len(queries), 1)
    with _one_thread():
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            found = np.empty((len(part), width), np.float32), np.empty((len(part), width), np.int64)
            sizes = (vectors.shape[1], len(part), len(vectors), width)
            pointers = [faiss.swig_ptr(array) for array in (part, vectors)]
            results = [faiss.swig_ptr(array) for array in found]
            if metric == "l2":
                faiss.knn_L2sqr(*pointers, *sizes, *results, None, selector)
            else:
                faiss.knn_inner_product(*pointers, *sizes, *results, selector)
            put_hits(found, metric, scores[start : start + step], positions[start : start + step])
    return scores, positions


class Ann:
    """Approximate search over vectors at positions 0..len-1, in order of their addition.

    Safe to use from many threads: searches run side by side; an addition is alone, in chunks of
    about HOLD_S, with a pause as long after each for which searches had to wait. After an exception
    from `add` the structure may be half changed and must be thrown away.

    Attributes:
        kind: any of `Kind` but `flat`, which is `search_block` and no structure.
        metric: what the scores are, see the module.
        dimension: of the vectors.
        holds_vectors: whether scores are exact; if not, they are of compressed vectors, and the
            best `candidates(kind, k)` are to be ranked anew.
        can_add: False for one whose lists stay on disk.
        effort: how hard a search tries, see index/effort.py.
        structure: the settings that it was made with, `IndexSettings.structure`.
    """

    def __init__(
        self,
        index: Any,
        kind: Kind,
        metric: Metric,
        *,
        structure: Mapping[str, Any],
        effort: int | None = None,
    ) -> None:
        """Use `train` or `load`."""
        self.kind = kind
        self.structure = dict(structure)
        self.metric = metric
        self.dimension = int(index.d)
        self.holds_vectors = kind in ("hnsw", "mapped")
        self.can_add = True
        self._index = index
        self._lists = 0 if kind == "hnsw" else int(index.nlist)
        ladder = efforts(kind, self._lists)
        self.effort = ladder[len(ladder) // 2] if effort is None else effort
        self._lock = ReadWriteLock()
        self._adding = threading.Lock()
        self._pace = Pace(HOLD_S, first=16)
        self._growing: list[GrowingVector] = []
        if kind == "hnsw":
            self._growing = parts_of_graph(faiss, index, row_bytes=4 * self.dimension)
        in_graph = kind == "hnsw" and metric != "l2"
        self._one = OneQuery(faiss, index, self._lock) if in_graph else None

    @classmethod
    def train(
        cls,
        kind: Kind,
        dimension: int,
        metric: Metric,
        settings: IndexSettings,
        sample: NDArray[np.float32] | None,
        expected_rows: int,
    ) -> "Ann":
        """An empty structure, with room for `expected_rows`.

        The IVF kinds learn from `sample` [n, dimension], of `training_rows` rows if there are as
        many; of fewer they make fewer lists. The same sample gives the same structure.

        Raises:
            InvalidSettings: `pq_bytes` does not divide the dimension.
            ValueError: `kind` has no structure, or it needs a sample and there is none.
        """
        measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        if kind == "hnsw":
            index = faiss.IndexHNSWFlat(dimension, settings.hnsw_m, measure)
            index.hnsw.efConstruction = settings.ef_construction
            ann = cls(index, kind, metric, structure=settings.structure())
            ann._reserve(expected_rows)
            return ann
        if not is_trained(kind):
            raise ValueError(f"kind must be one with a structure, got {kind!r}")
        if sample is None or len(sample) < 256:
            rows = 0 if sample is None else len(sample)
            raise ValueError(f"kind {kind!r} trains on a sample of at least 256 rows, got {rows}")
        lists = min(lists_for(settings, expected_rows), max(1, len(sample) // _POINTS_A_LIST))
        index = inverted_file(faiss, kind, dimension, measure, lists, settings)
        index.cp.spherical = metric != "l2"
        index.cp.min_points_per_centroid = 1  # fewer are as good as it gets: no complaint on stderr
        index.train(_matrix(sample))
        return cls(index, kind, metric, structure=settings.structure())

    @classmethod
    def load(
        cls,
        path: Path,
        kind: Kind,
        metric: Metric,
        *,
        structure: Mapping[str, Any],
        effort: int | None = None,
    ) -> "Ann":
        """What `save` wrote. `mapped` stays in the file, which must stay where it is.

        Raises:
            ValueError: the file cannot be read, or holds another kind or metric.
        """
        flags = faiss.IO_FLAG_MMAP if kind == "mapped" else 0
        try:
            index = faiss.read_index(str(path), flags | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        except RuntimeError as error:
            raise ValueError(f"{path.name}: not an index that faiss can read: {error}") from error
        measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        if not isinstance(index, _CLASSES.get(kind, ())) or index.metric_type != measure:
            raise ValueError(f"{path.name}: not an index of kind {kind!r} and metric {metric!r}")
        ann = cls(index, kind, metric, structure=structure, effort=effort)
        ann.can_add = kind != "mapped"
        return ann

    def save(self, path: Path) -> None:
        """Write everything to one file. Searches go on meanwhile; additions wait.

        Raises:
            OSError: the file could not be written.
        """
        with self._adding, path.open("wb", buffering=0) as file:
            write_index(faiss, self._index, file)

    def __len__(self) -> int:
        return int(self._index.ntotal)  # without the lock: searches ask for it

    @property
    def efforts(self) -> tuple[int, ...]:
        """What `effort` can be set to, in rising order."""
        return efforts(self.kind, self._lists)

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory, estimated from the structure."""
        with self._lock.reading():
            if self.kind == "hnsw":
                return sum(part.memory_bytes for part in self._growing)
            coarse = self._lists * self.dimension * 4
            if not self.can_add:
                return coarse
            return coarse + int(self._index.ntotal) * (int(self._index.code_size) + 8)

    def add(
        self, vectors: NDArray[np.float32], *, should_stop: Callable[[], bool] = lambda: False
    ) -> int:
        """Add rows [n, dimension] in chunks; how many were added before `should_stop` said so."""
        if not self.can_add:
            raise ValueError(f"an index of kind {self.kind!r} that was loaded cannot be added to")
        vectors, added = _matrix(vectors), 0
        with self._adding:
            while added < len(vectors) and not should_stop():
                rows = self._pace.items
                if rows > _PARALLEL_FROM // 2:  # on two cores or more it takes no longer
                    rows = max(rows, _PARALLEL_FROM)
                chunk = vectors[added : added + rows]
                self._reserve(int(self._index.ntotal) + len(chunk))
                with self._lock.writing():
                    started = time.perf_counter()
                    self._index.add(chunk)
                    held_s = time.perf_counter() - started
                    waiting = self._lock.readers_waiting
                self._pace.record(len(chunk), held_s)
                added += len(chunk)
                if waiting:
                    time.sleep(held_s)
        return added

    def settle(self, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Put a graph on large pages once rows were added or loaded, for faster searches.

        Searches go on meanwhile, additions wait. `should_stop` is asked between pieces of 64 MiB;
        what is left then is done by the next call. Where the system refuses, nothing changes.
        """
        with self._adding:
            for part in self._growing:
                part.settle(should_stop)

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.bool_] | None = None,
        effort: int | None = None,
    ) -> Hits:
        """The k nearest positions to each of `queries` [q, dimension].

        `allowed` [m] leaves out positions that are False, or m and above. Where k (allowed) rows
        exist, k are found: what the structure cannot find is looked for exactly.
        """
        # What an addition under way has counted already is there once the lock is had.
        queries, rows = _matrix(queries), len(self)
        effort = effort or self.effort
        chosen = rows if allowed is None else int(np.count_nonzero(allowed[:rows]))
        if allowed is not None and exact_is_cheaper(
            self.kind, effort, allowed=chosen, rows=rows, lists=self._lists
        ):
            return self.search_rows(queries, np.flatnonzero(allowed[:rows]), k)
        if not chosen or not len(queries):
            return no_hits(len(queries), k)
        selector = None if allowed is None else _bitmap(allowed)
        width = min(k, chosen)
        parameters = self._parameters(effort, width, chosen / rows, selector)
        scores, positions = self._in_holds(
            queries, k, partial(_find, self._index, k=width, parameters=parameters)
        )
        if not is_filled(positions, width):
            short = np.flatnonzero(positions[:, width - 1] < 0)
            among = np.arange(rows) if allowed is None else np.flatnonzero(allowed[:rows])
            scores[short], positions[short] = self.search_rows(queries[short], among, k)
        return scores, positions

    def search_one(
        self, query: NDArray[np.float32], k: int, live: Live | None
    ) -> tuple[list[float], list[int]] | None:
        """`search` for one query [dimension] among the `live` positions, all without it.

        None where that takes more than a quick look at a graph.
        """
        one = self._one
        return None if one is None else one.search(query, k, effort=self.effort, live=live)

    def search_rows(self, queries: NDArray[np.float32], among: NDArray[np.int64], k: int) -> Hits:
        """The k nearest to each query among the positions `among` [m], by looking at each of them.

        Exact where the structure `holds_vectors`.
        """
        queries = _matrix(queries)
        best = no_hits(len(queries), k)
        if len(among) and len(queries):
            for scan in self._scans(np.ascontiguousarray(among, dtype=np.int64), k):
                best = best_hits(best, self._in_holds(queries, k, scan))
        return best

    def _in_holds(self, queries: NDArray[np.float32], k: int, search: Search) -> Hits:
        """Search some queries at a time, for about as long as an addition holds the structure.

        An addition waits for the searches before it, and later ones wait behind it.
        """
        scores, positions = no_hits(len(queries), k)
        pace, start = Pace(HOLD_S, first=1), 0
        with _one_thread():
            while start < len(queries):
                part = slice(start, start + pace.items)
                with self._lock.reading():
                    started = time.perf_counter()
                    found = search(queries[part])
                    held_s = time.perf_counter() - started
                put_hits(found, self.metric, scores[part], positions[part])
                pace.record(len(found[0]), held_s)
                start += len(found[0])
        return scores, positions

    def _scans(self, among: NDArray[np.int64], k: int) -> Iterator[Search]:
        """Searches that look at each row of `among`, a part of them each."""
        if self.kind == "hnsw":
            storage = self._index.storage
            for start in range(0, len(among), _ROWS_A_HOLD):
                rows = among[start : start + _ROWS_A_HOLD]
                chosen = faiss.SearchParameters(sel=faiss.IDSelectorArray(rows))
                width = min(k, len(rows))
                yield partial(_find, storage, k=width, parameters=chosen)
            return
        # The centres from the quantizer, and not its own search: a graph may miss some lists.
        centroids = self._index.quantizer.reconstruct_n(0, self._lists)
        allowed = np.zeros(int(among[-1]) + 1, dtype=np.bool_)
        allowed[among] = True
        selector = _bitmap(allowed)
        lists_a_hold = max(1, self._lists * _ROWS_A_HOLD // max(1, int(self._index.ntotal)))
        for first in range(0, self._lists, lists_a_hold):
            lists = np.arange(first, min(first + lists_a_hold, self._lists), dtype=np.int64)
            near = (centroids[lists], self.metric, selector)
            yield partial(search_lists, faiss, self._index, lists, *near, k=k)

    def _parameters(self, effort: int, k: int, share: float, selector: Any) -> Any:
        if self.kind == "hnsw":
            kept = candidates_kept(effort, k, share)
            return faiss.SearchParametersHNSW(efSearch=kept, sel=selector)
        lists = lists_probed(effort, self._lists, share)
        coarse = None
        if isinstance(self._index.quantizer, faiss.IndexHNSW):
            coarse = faiss.SearchParametersHNSW(efSearch=max(64, 2 * lists))
        return faiss.SearchParametersIVF(nprobe=lists, sel=selector, quantizer_params=coarse)

    def _reserve(self, rows: int) -> None:
        for part in self._growing:
            part.reserve(rows, self._lock)


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenMP's number of threads is a setting of the calling thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _find(index: Any, queries: NDArray[np.float32], *, k: int, parameters: Any) -> Hits:
    """What faiss finds, [q, k] each. Its own method in Python takes 15 µs more."""
    found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    scores, positions = (faiss.swig_ptr(array) for array in found)
    index.search_c(len(queries), faiss.swig_ptr(queries), k, scores, positions, parameters)
    return found


def _bitmap(allowed: NDArray[np.bool_]) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _matrix(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(rows, dtype=np.float32)


_CLASSES = {
    "hnsw": faiss.IndexHNSWFlat,
    "ivf_sq8": faiss.IndexIVFScalarQuantizer,
    "ivf_pq": faiss.IndexIVFPQ,
    "mapped": faiss.IndexIVFFlat,
}
