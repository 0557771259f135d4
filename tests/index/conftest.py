from collections.abc import Iterator
from pathlib import Path

import pytest

from index.collection import Collection
from index.collection_set import CollectionSet
from tests.index.helpers import create


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "collections"


@pytest.fixture
def collections(root: Path) -> Iterator[CollectionSet]:
    with CollectionSet(root) as opened:
        yield opened


@pytest.fixture
def collection(collections: CollectionSet) -> Collection:
    return create(collections)
