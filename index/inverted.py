"""Inverted files, as faiss has them. `faiss` is handed over: `index.ann` alone imports it."""

from typing import Any

from index.kinds import IndexSettings, Kind, pq_bytes_for

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
