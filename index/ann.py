"""Nearest neighbours in memory. The only file that imports faiss.

Nothing here is kept on disk for good: all of it can be rebuilt from the store.

Scores: greater is nearer. They are inner products for the metrics `cosine` (whose vectors come here
at unit length) and `ip`, and for `l2` minus the squared distance.

Threads: faiss lets go of the interpreter lock, so searches run side by side on the threads that
call. OpenMP's number of threads is a setting of the calling thread; a search sets it to `threads`
(1 unless told otherwise) and puts it back, additions use what OpenMP was started with.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from index.effort import (
    candidates,
    candidates_kept,
    efforts,
    exact_is_cheaper,
    lists_probed,
    recall,
)
from index.growth import GrowingVector
from index.kinds import IndexSettings, Kind, Metric, is_trained, lists_for, pq_bytes_for
from index.locks import Pace, ReadWriteLock
from index.records import normalise

faiss: Any = _faiss  # its type stubs lack half of what is used here

HOLD_S = 0.02
"""How long, in seconds, additions aim to keep searches waiting."""
MAX_HOLD_S = 0.05
"""The stated bound on it: on a machine whose cores are not all taken by others."""

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
    *,
    threads: int = 1,
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
    with _openmp_threads(threads):
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
        self._growing = _growing_parts(index) if kind == "hnsw" else []
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
        threads: int = 1,
    ) -> Found:
        """The k nearest positions to each of `queries` [q, dimension].

        `allowed` [m] leaves out positions that are False, or m and above. Where k (allowed) rows
        exist, k are found: what the structure cannot find is looked for exactly.
        """
        # Without the lock: what an addition under way has counted already is there below.
        queries, rows = _matrix(queries), int(self._index.ntotal)
        chosen = rows if allowed is None else int(np.count_nonzero(allowed[:rows]))
        if allowed is not None and chosen < rows and self.exact_is_cheaper(chosen, rows):
            return self.search_rows(queries, np.flatnonzero(allowed[:rows]), k, threads=threads)
        if not chosen or not len(queries):
            return _nothing(len(queries), k)
        selector = None if allowed is None else _bitmap(allowed)
        width = min(k, chosen)
        parameters = self._parameters(effort or self.effort, width, chosen / rows, selector)
        if len(queries) == 1 and width == k and self.metric != "l2":
            # What faiss gives is the answer, but for a rare one that is short.
            with _openmp_threads(threads), self._lock.reading():
                found: Found = self._index.search(queries, k, params=parameters)
            if found[1][0, -1] >= 0:
                return found
        scores, positions = _nothing(len(queries), k)
        with _openmp_threads(threads):
            for start in range(0, len(queries), _QUERIES_A_HOLD):
                part = slice(start, start + _QUERIES_A_HOLD)
                with self._lock.reading():
                    found = self._index.search(queries[part], width, params=parameters)
                _put(found, self.metric, scores[part], positions[part])
        short = np.flatnonzero(positions[:, width - 1] < 0)
        if len(short):
            among = np.arange(rows) if allowed is None else np.flatnonzero(allowed[:rows])
            found = self.search_rows(queries[short], among, k, threads=threads)
            scores[short], positions[short] = found
        return scores, positions

    def search_rows(
        self,
        queries: NDArray[np.float32],
        among: NDArray[np.int64],
        k: int,
        *,
        threads: int = 1,
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
        with _openmp_threads(threads):
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

    def exact_is_cheaper(self, allowed: int, rows: int) -> bool:
        """Whether `search_rows` is quicker than a filtered search for `allowed` of `rows`."""
        return exact_is_cheaper(
            self.kind, self.effort, allowed=allowed, rows=rows, lists=self._lists
        )

    def tune(
        self,
        queries: NDArray[np.float32],
        truth: NDArray[np.int64],
        k: int,
        target_recall: float,
    ) -> float:
        """Set `effort` to the least that finds `target_recall` of `truth`, or to the greatest.

        Args:
            queries: [q, dimension], q > 0.
            truth: [q, k], the positions of the true nearest; -1 where there are fewer than k.
            k: how many are wanted; `candidates(kind, k)` are looked at.
            target_recall: in (0, 1].

        Returns:
            The recall at this effort, in [0, 1].
        """
        measured = 0.0
        for effort in efforts(self.kind, self._lists):
            _, found = self.search(queries, candidates(self.kind, k), effort=effort)
            measured = recall(truth, found)
            self.effort = effort
            if measured >= target_recall:
                break
        return measured

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


def _growing_parts(index: Any) -> list[GrowingVector]:
    codes, graph = faiss.downcast_index(index.storage).codes, index.hnsw
    links = int(graph.nb_neighbors(1))
    sizes = [
        (codes, codes.owned_data, 1, 4 * int(index.d), 0),
        # 2 · links on the lowest level and about one above it; levels are drawn by lot.
        (graph.neighbors, graph.neighbors.owned_data, 4, 2 * links + 2, 40 * links),
        (graph.levels, graph.levels, 4, 1, 0),
        (graph.offsets, graph.offsets, 8, 1, 1),
    ]
    return [
        GrowingVector(
            outer,
            inner,
            item_bytes=item_bytes,
            items_a_row=items,
            spare=spare,
            copy=faiss.memcpy,
            free=_free,
        )
        for outer, inner, item_bytes, items, spare in sizes
    ]


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
def _openmp_threads(threads: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
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


@dataclass(frozen=True, eq=False)
class Hits:
    """One query's neighbours, best first: `keys` int64 [m], `scores` float32 [m], m <= k."""

    keys: NDArray[np.int64]
    scores: NDArray[np.float32]


class FlatIndex:
    """Exact search by cosine over float32 vectors that carry integer keys.

    Safe to use from many threads. Rows are normalised on their way in, so that the inner product is
    the cosine; they must be finite and not all zero.
    """

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
        self._highest_key = -1
        # Searches run side by side (faiss lets go of the interpreter lock), so a plain lock would
        # queue them behind one another; a change must be alone.
        self._lock = ReadWriteLock()

    def __len__(self) -> int:
        with self._lock.reading():
            return int(self._index.ntotal)

    def upsert(self, keys: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Put vectors [n, dimension] under distinct keys [n], in place of any that are there."""
        if not len(keys):
            return
        keys = np.ascontiguousarray(keys, dtype=np.int64)
        unit = np.ascontiguousarray(normalise(vectors))
        with self._lock.writing():
            # IDMap2 would keep two vectors under one key in silence, so the old ones go first. The
            # store's keys only grow: above the highest there is nothing to look for, and a bulk
            # load is spared a pass over the whole index for each batch.
            self._remove(keys[keys <= self._highest_key])
            self._index.add_with_ids(unit, keys)
            self._highest_key = max(self._highest_key, int(keys.max()))

    def remove(self, keys: NDArray[np.int64]) -> None:
        """Take keys [n] out, in one pass over the whole index; absent ones are no error."""
        with self._lock.writing():
            self._remove(np.ascontiguousarray(keys, dtype=np.int64))

    def search(
        self, queries: NDArray[np.float32], k: int, *, exclude: NDArray[np.int64] | None = None
    ) -> list[Hits]:
        """The k best keys for each query [n, dimension], leaving out the keys in `exclude`.

        Fewer than k only where the index has no more. Equal scores stand in order of their keys,
        also where the k-th place is tied.
        """
        excluded = np.empty(0, np.int64) if exclude is None else np.unique(exclude)
        unit = np.ascontiguousarray(normalise(queries))
        hits = [Hits(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in unit]
        with self._lock.reading():
            total = int(self._index.ntotal)
            pending = np.arange(len(unit) if total else 0)
            wanted = k + len(excluded) + 1  # one more shows whether a tie crosses the cut
            while len(pending):
                fetched = min(wanted, total)
                scores, keys = self._index.search(unit[pending], fetched)
                unsettled = []
                for row, row_keys, row_scores in zip(pending, keys, scores, strict=True):
                    hits[row] = _best(row_keys, row_scores, k, excluded)
                    # Whatever was not fetched scores at most row_scores[-1].
                    tied = hits[row].scores[-1:] == row_scores[-1]
                    if fetched < total and (len(hits[row].keys) < k or tied.any()):
                        unsettled.append(row)
                pending = np.array(unsettled, dtype=np.intp)
                wanted *= 4
        return hits

    def _remove(self, keys: NDArray[np.int64]) -> None:
        if len(keys):
            self._index.remove_ids(faiss.IDSelectorBatch(keys))


def _best(
    keys: NDArray[np.int64], scores: NDArray[np.float32], k: int, excluded: NDArray[np.int64]
) -> Hits:
    kept = keys != -1  # faiss fills up with -1 where it found fewer
    if len(excluded):
        kept &= ~np.isin(keys, excluded)
    keys, scores = keys[kept], scores[kept]
    order = np.lexsort((keys, -scores))[:k]
    return Hits(keys[order], scores[order])
