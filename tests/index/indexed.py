"""Collections of clustered rows, whose indexes are saved and cleared out early."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet
from index.kinds import IndexSettings
from index.maintenance import BuildPolicy
from tests.index.helpers import MODEL, cosines

DIMENSION = 16
ROWS = 6000
POLICY = BuildPolicy(save_rows=500, save_share=0, compact_rows=200, compact_share=0.01)
HNSW = IndexSettings(kind="hnsw", hnsw_m=16)


@cache
def clustered_rows() -> Any:
    """[ROWS, DIMENSION]; not to be changed."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((50, DIMENSION))
    made = centres[random.integers(50, size=ROWS)]
    return (made + 0.4 * random.standard_normal(made.shape)).astype(np.float32)


def records(rows: Any, first: int = 0) -> list[NewRecord]:
    return [
        NewRecord(f"r{first + i}", {"cls": row}, {"number": first + i})
        for i, row in enumerate(rows)
    ]


def opened(root: Path) -> CollectionSet:
    return CollectionSet(root, policy=POLICY)


def make(collections: CollectionSet, rows: Any, settings: IndexSettings) -> Collection:
    collection = collections.create("c", spaces={"cls": DIMENSION}, model=MODEL, settings=settings)
    for start in range(0, len(rows), 1000):
        collection.upsert(records(rows[start : start + 1000], start))
    assert collection.wait_until_built(timeout_s=120)
    return collection


def recall_at_10(collection: Collection, rows: Any) -> float:
    random = np.random.default_rng(1)
    asked = rows[::60] + 0.2 * random.standard_normal((len(rows[::60]), DIMENSION))
    hits = 0
    for query, found in zip(asked, collection.search_batch(asked, 10), strict=True):
        best = np.argsort(-cosines(query, rows))[:10]
        hits += len({f"r{n}" for n in best.tolist()} & {match.id for match in found})
    return hits / (10 * len(asked))


def links(collection: Collection) -> int:
    """Of a vector in the graph, above its lowest level."""
    ann = collection._mirror.view.spaces["cls"].ann
    assert ann is not None
    return int(ann._index.hnsw.nb_neighbors(1))
