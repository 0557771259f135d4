"""What several test modules build with."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet

REPOSITORY = Path(__file__).parents[2]
SPACES = {"cls": 4, "copy": 6}
MODEL = "sha256:a-model"


def vectors(seed: int, spaces: dict[str, int] = SPACES) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    return {
        space: random.standard_normal(dimension).astype(np.float32)
        for space, dimension in spaces.items()
    }


def record(id: str, seed: int = 0, **metadata: object) -> NewRecord:  # noqa: A002
    return NewRecord(id, vectors(seed), metadata, content_hash=f"hash-{seed}")


def fill(collection: Collection, count: int) -> list[NewRecord]:
    records = [record(f"r{number}", number, number=number) for number in range(count)]
    collection.upsert(records)
    return records


def create(collections: CollectionSet, name: str = "pictures") -> Collection:
    return collections.create(name, spaces=SPACES, model=MODEL)


def cosines(query: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Brute force, in float64."""
    query, rows = query.astype(np.float64), rows.astype(np.float64)
    products: NDArray[np.float64] = rows @ query
    return products / (np.linalg.norm(rows, axis=1) * np.linalg.norm(query))


def outcomes(collection: Collection, *records: NewRecord) -> list[str]:
    return [each.outcome for each in collection.upsert(records)]
