import pytest

from index.collection import Collection
from index.collection_set import CollectionSet
from index.errors import InvalidSettings
from index.kinds import IndexSettings
from tests.index.helpers import MODEL, SPACES


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
