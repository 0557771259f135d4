"""Inverted files, as faiss has them. `faiss` is handed over: `index.ann` alone imports it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.hits import Hits
from index.kinds import IndexSettings, Kind, Metric, pq_bytes_for

_COARSE_GRAPH_FROM = 1_000  # lists from which finding the nearest ones is worth a graph


def inverted_file(
    faiss: Any, kind: Kind, dimension: int, measure: int, lists: int, settings: IndexSettings
) -> Any:
    """An empty index of one of the IVF kinds, to be trained."""
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


def search_lists(
    faiss: Any,
    index: Any,
    lists: NDArray[np.int64],
    centroids: NDArray[np.float32],
    metric: Metric,
    selector: Any,
    queries: NDArray[np.float32],
    *,
    k: int,
) -> Hits:
    """What faiss finds of `queries` [q, d] in lists [n], whose centres are `centroids` [n, d].

    Of what `selector` lets through; all of it is looked at.
    """
    near = queries @ centroids.T
    if metric == "l2":
        near = np.stack([np.square(centroids - query).sum(axis=1) for query in queries])
    order = np.tile(lists, (len(queries), 1))
    found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    arrays = (order, np.ascontiguousarray(near), *found)
    index.search_preassigned_c(
        len(queries),
        faiss.swig_ptr(queries),
        k,
        *(faiss.swig_ptr(array) for array in arrays),
        False,
        faiss.SearchParametersIVF(nprobe=len(lists), sel=selector),
    )
    return found
