from pathlib import Path

import pytest

from index import statistics
from index.collection import Collection
from index.collection_set import CollectionSet
from index.errors import CollectionNotFound, InvalidSettings
from index.kinds import IndexSettings
from tests.index.helpers import MODEL, SPACES, fill


def test_settings_must_fit_every_space(collections: CollectionSet, collection: Collection) -> None:
    fits = IndexSettings(kind="ivf_pq", pq_bytes=2)
    wrong = IndexSettings(kind="ivf_pq", pq_bytes=4)  # divides 4, and not 6
    collection.configure(fits)
    with pytest.raises(InvalidSettings, match="must divide the dimension, 6, got 4"):
        collection.configure(wrong)
    assert collection.settings == fits
    with pytest.raises(InvalidSettings, match="must divide the dimension, 6, got 4"):
        collections.create("other", spaces=SPACES, model=MODEL, settings=wrong)
    assert collections.names() == ["pictures"]


def test_statistics_of_a_collection_that_is_deleted_meanwhile(
    collections: CollectionSet, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 3)
    cache_bytes = statistics.cache_bytes

    def delete_first(folder: Path) -> int:
        collections.delete("pictures")
        return cache_bytes(folder)

    monkeypatch.setattr(statistics, "cache_bytes", delete_first)
    assert collection.stats().count == 3
    assert collection._store.database.disk_bytes() == 0
    with pytest.raises(CollectionNotFound):
        collection.stats()
