"""Nearest neighbours in memory, all of it to be had again from the store. Alone imports faiss.

Scores: greater is nearer. They are inner products for the metrics `cosine` (whose vectors come here
at unit length) and `ip`, and for `l2` minus the squared distance.

Threads: faiss lets go of the interpreter lock, so searches run side by side on the threads that
call, each on that one thread; additions use as many as OpenMP was started with.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from index.effort import candidates_kept, efforts, exact_is_cheaper, lists_probed
from index.growth import GrowingVector, parts_of_graph
from index.kinds import IndexSettings, Kind, Metric, is_trained, lists_for, pq_bytes_for
from index.locks import Pace, ReadWriteLock

faiss: Any = _faiss  # its type stubs lack half of what is used here

HOLD_S = 0.02  # how long, in seconds, additions aim to keep searches waiting
MAX_HOLD_S = 0.05  # the stated bound on it, on a machine whose cores are not all taken by others

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores and positions [q, k], best first; -inf and -1 where fewer than k were found."""

_QUERIES_A_HOLD = 32
_ROWS_A_HOLD = 65_536
# hnsw: faiss adds on one core where no more than 100 vectors of a call are of one level.
_PARALLEL_FROM = 112
_POINTS_A_LIST = 39  # the fewest that faiss's k-means takes without a complaint
_COARSE_GRAPH_FROM = 1_000  # lists from which finding the nearest ones is worth a graph


def search_block(
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    k: int,
    metric: Metric,
    allowed: NDArray[np.bool_] | None = None,
) -> Found:
    """The k nearest of `vectors` [m, d] to each of `queries` [q, d], exactly.

    `vectors` is read where it stands (a slice of whole rows is good). `allowed` [m] leaves out the
    rows that are False. Positions are rows of `vectors`.
    """
    queries, vectors = _matrix(queries), _matrix(vectors)
    scores, positions = _nothing(len(queries), k)
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
            _put(found, metric, scores[start : start + step], positions[start : start + step])
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
    """

    def __init__(self, index: Any, kind: Kind, metric: Metric, *, effort: int | None) -> None:
        """Use `train` or `load`."""
        self.kind = kind
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
            codes = faiss.downcast_index(index.storage).codes
            self._growing = parts_of_graph(
                index.hnsw, codes, row_bytes=4 * self.dimension, copy=faiss.memcpy, free=_free
            )
        self._unfiltered: dict[int, Any] = {}

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
            ann = cls(index, kind, metric, effort=None)
            ann._reserve(expected_rows)
            return ann
        if not is_trained(kind):
            raise ValueError(f"kind must be one with a structure, got {kind!r}")
        if sample is None or len(sample) < 256:
            rows = 0 if sample is None else len(sample)
            raise ValueError(f"kind {kind!r} trains on a sample of at least 256 rows, got {rows}")
        lists = min(lists_for(settings, expected_rows), max(1, len(sample) // _POINTS_A_LIST))
        index = _inverted_file(kind, dimension, measure, lists, settings)
        index.cp.spherical = metric != "l2"
        index.cp.min_points_per_centroid = 1  # fewer are as good as it gets: no complaint on stderr
        index.train(_matrix(sample))
        return cls(index, kind, metric, effort=None)

    @classmethod
    def load(cls, path: Path, kind: Kind, metric: Metric, *, effort: int | None = None) -> "Ann":
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
        if not isinstance(index, _CLASSES[kind]) or index.metric_type != measure:
            raise ValueError(f"{path.name}: not an index of kind {kind!r} and metric {metric!r}")
        ann = cls(index, kind, metric, effort=effort)
        ann.can_add = kind != "mapped"
        return ann

    def save(self, path: Path) -> None:
        """Write everything to one file. Searches go on meanwhile; additions wait.

        Raises:
            OSError: the file could not be written.
        """
        with self._adding:
            try:
                faiss.write_index(self._index, str(path))
            except RuntimeError as error:
                raise OSError(f"{path.name}: faiss could not write it: {error}") from error

    def __len__(self) -> int:
        with self._lock.reading():
            return int(self._index.ntotal)

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

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.bool_] | None = None,
        effort: int | None = None,
    ) -> Found:
        """The k nearest positions to each of `queries` [q, dimension].

        `allowed` [m] leaves out positions that are False, or m and above. Where k (allowed) rows
        exist, k are found: what the structure cannot find is looked for exactly.
        """
        # Without the lock: what an addition under way has counted already is there below.
        queries, rows = _matrix(queries), int(self._index.ntotal)
        scores, positions = _nothing(len(queries), k)
        chosen = rows if allowed is None else int(np.count_nonzero(allowed[:rows]))
        if allowed is not None and exact_is_cheaper(
            self.kind, self.effort, allowed=chosen, rows=rows, lists=self._lists
        ):
            return self.search_rows(queries, np.flatnonzero(allowed[:rows]), k)
        if not chosen or not len(queries):
            return scores, positions
        selector = None if allowed is None else _bitmap(allowed)
        width = min(k, chosen)
        parameters = self._parameters(effort or self.effort, width, chosen / rows, selector)
        with _one_thread():
            for start in range(0, len(queries), _QUERIES_A_HOLD):
                part = slice(start, start + _QUERIES_A_HOLD)
                with self._lock.reading():
                    found = self._index.search(queries[part], width, params=parameters)
                _put(found, self.metric, scores[part], positions[part])
        short = np.flatnonzero(positions[:, width - 1] < 0)
        if len(short):
            among = np.arange(rows) if allowed is None else np.flatnonzero(allowed[:rows])
            found = self.search_rows(queries[short], among, k)
            scores[short], positions[short] = found
        return scores, positions

    def search_rows(
        self,
        queries: NDArray[np.float32],
        among: NDArray[np.int64],
        k: int,
    ) -> Found:
        """The k nearest to each query among the positions `among` [m], by looking at each of them.

        Exact where the structure `holds_vectors`.
        """
        queries, among = _matrix(queries), np.ascontiguousarray(among, dtype=np.int64)
        scores, positions = _nothing(len(queries), k)
        width = min(k, len(among))
        if not width:
            return scores, positions
        step = max(1, _ROWS_A_HOLD // len(among)) if self.kind == "hnsw" else 1
        with _one_thread():
            for start in range(0, len(queries), step):
                part = slice(start, start + step)
                with self._lock.reading():
                    if self.kind == "hnsw":
                        chosen = faiss.SearchParameters(sel=faiss.IDSelectorArray(among))
                        found = self._index.storage.search(queries[part], width, params=chosen)
                    else:
                        found = self._search_every_list(queries[part], among, width)
                _put(found, self.metric, scores[part], positions[part])
        return scores, positions

    def _parameters(self, effort: int, k: int, share: float, selector: Any) -> Any:
        if self.kind == "hnsw":
            kept = candidates_kept(effort, k, share)
            if selector is not None:
                return faiss.SearchParametersHNSW(efSearch=kept, sel=selector)
            if kept not in self._unfiltered:  # searches share one: making it takes 15 µs
                self._unfiltered[kept] = faiss.SearchParametersHNSW(efSearch=kept)
            return self._unfiltered[kept]
        lists = lists_probed(effort, self._lists, share)
        coarse = None
        if isinstance(self._index.quantizer, faiss.IndexHNSW):
            coarse = faiss.SearchParametersHNSW(efSearch=max(64, 2 * lists))
        return faiss.SearchParametersIVF(nprobe=lists, sel=selector, quantizer_params=coarse)

    def _search_every_list(
        self, queries: NDArray[np.float32], among: NDArray[np.int64], k: int
    ) -> Found:
        index, lists = self._index, self._lists
        # Not by the quantizer's own search: a graph may miss some lists.
        centroids = index.quantizer.reconstruct_n(0, lists)
        allowed = np.zeros(int(index.ntotal), dtype=np.bool_)
        allowed[among] = True
        parameters = faiss.SearchParametersIVF(nprobe=lists, sel=_bitmap(allowed))
        found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        near = queries @ centroids.T
        if self.metric == "l2":
            near = ((queries[:, None, :] - centroids[None]) ** 2).sum(axis=2)
        order = np.tile(np.arange(lists, dtype=np.int64), (len(queries), 1))
        pointers = [faiss.swig_ptr(a) for a in (order, np.ascontiguousarray(near), *found)]
        index.search_preassigned_c(
            len(queries), faiss.swig_ptr(queries), k, *pointers, False, parameters
        )
        return found

    def _reserve(self, rows: int) -> None:
        for part in self._growing:
            part.reserve(rows, self._lock)


def _free(vector: Any) -> None:
    """Python's own freeing holds the interpreter lock, 50 ms a gigabyte; faiss's calls do not."""
    if isinstance(vector, faiss.UInt8Vector):
        holder = faiss.IndexFlatL2(1)
        holder.codes.owned_data.swap(vector)
        holder.permute_entries(np.empty(0, np.int64))


def _inverted_file(
    kind: Kind, dimension: int, measure: int, lists: int, settings: IndexSettings
) -> Any:
    graph = lists > _COARSE_GRAPH_FROM
    coarse = (
        faiss.IndexHNSWFlat(dimension, 32, measure)
        if graph
        else faiss.IndexFlat(dimension, measure)
    )
    if kind == "mapped":
        index = faiss.IndexIVFFlat(coarse, dimension, lists, measure)
    elif kind == "ivf_sq8":
        codes = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(coarse, dimension, lists, codes, measure)
    else:
        parts = pq_bytes_for(settings, dimension)
        index = faiss.IndexIVFPQ(coarse, dimension, lists, parts, 8, measure)
        index.pq.cp.min_points_per_centroid = 1
        index.use_precomputed_table = -1  # faster for l2 alone, at lists · parts · 1 KiB of memory
    if graph:
        index.quantizer_trains_alone = 2  # the lists' centres come from k-means, not from the graph
    return index


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenMP's number of threads is a setting of the calling thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _bitmap(allowed: NDArray[np.bool_]) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def _matrix(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(rows, dtype=np.float32)


def _nothing(queries: int, k: int) -> Found:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)


def _put(
    found: Found, metric: Metric, scores: NDArray[np.float32], positions: NDArray[np.int64]
) -> None:
    """Put what faiss found into the first columns of `scores` and `positions`."""
    width = found[0].shape[1]
    better = -found[0] if metric == "l2" else found[0]
    scores[:, :width] = np.where(found[1] < 0, -np.inf, better)
    positions[:, :width] = found[1]


_CLASSES = {
    "hnsw": faiss.IndexHNSWFlat,
    "ivf_sq8": faiss.IndexIVFScalarQuantizer,
    "ivf_pq": faiss.IndexIVFPQ,
    "mapped": faiss.IndexIVFFlat,
}
