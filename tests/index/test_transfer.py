"""Exports and imports: what went out comes in equal, and what does not fit is named."""

import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet
from index.errors import (
    CollectionError,
    CollectionExists,
    CollectionNotFound,
    FormatUnavailable,
    InvalidName,
    InvalidVector,
    ModelMismatch,
)
from index.transfer import FORMATS, Format, export_records, import_new, import_records
from tests.index.exports import HEADER, contents, exported, imported, text
from tests.index.helpers import MODEL, SPACES, create, fill, record, vectors

pytest.importorskip("pyarrow")

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.builds(
    NewRecord,
    id=TEXTS,
    # Every finite float32, subnormals and minus zero too.
    vectors=st.fixed_dictionaries(
        {
            "id": arrays.arrays(
                np.float32, 3, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
            ).filter(np.any),
            "b-2": arrays.arrays(np.float32, 1, elements=st.just(np.float32(1))),
        }
    ),
    metadata=st.dictionaries(TEXTS, JSON_VALUES, max_size=3),
    content_hash=st.none() | TEXTS,
    thumbnail=st.none() | st.binary(max_size=20),
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches=st.lists(st.lists(RECORDS, max_size=8, unique_by=lambda new: new.id), max_size=2))
def test_what_went_out_comes_in_equal(
    format: Format,  # noqa: A002
    batches: list[list[NewRecord]],
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        CollectionSet(Path(folder)) as collections,
    ):
        collection = collections.create("a", spaces={"id": 3, "b-2": 1}, model="모델")
        for batch in batches:
            collection.upsert(batch)
        file = io.BytesIO(exported(collection, format))
        counts = import_new(collections, "b", file, format=format)
        copy = collections.get("b")
        assert counts == {"created": collection.count(), "updated": 0, "unchanged": 0}
        assert (copy.model, copy.spaces) == (collection.model, collection.spaces)
        assert contents(copy) == contents(collection)


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_float_comes_back_bit_for_bit(
    collections: CollectionSet,
    format: Format,  # noqa: A002
) -> None:
    # The first is the one that its shortest decimal, read through float64, misses.
    bits = np.array([0x15AE43FD, 0x80000000, 1, 0x007FFFFF, 0x7F7FFFFF, 0x80000001], np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 60_000, dtype=np.uint32)
    odd = np.concatenate([bits, random]).view(np.float32)
    odd = odd[np.isfinite(odd)][:59_000]
    collection = collections.create("a", spaces={"cls": len(odd)}, model=MODEL)
    collection.upsert([NewRecord("x", {"cls": odd})])
    import_new(collections, "b", io.BytesIO(exported(collection, format)), format=format)
    back = collections.get("b").get("x", with_vectors=True).vectors["cls"]
    np.testing.assert_array_equal(back.view(np.uint32), odd.view(np.uint32))


@pytest.mark.parametrize("format", FORMATS)
def test_more_than_a_batch_and_again(
    collections: CollectionSet,
    collection: Collection,
    format: Format,  # noqa: A002
) -> None:
    fill(collection, 1300)  # more than a batch, and many pages
    collection.upsert([replace(record("r7", 9000), thumbnail=b"small")])
    content, steps = exported(collection, format), list[int]()
    out = list[int]()
    export_records(collection, io.BytesIO(), format=format, progress=out.append)
    assert sum(out) == 1300
    counts = import_new(collections, "b", io.BytesIO(content), format=format, progress=steps.append)
    assert counts == {"created": 1300, "updated": 0, "unchanged": 0}
    assert steps == [1000, 300]
    copy = collections.get("b")
    assert contents(copy) == contents(collection)
    copy.upsert([record("r3", 9001), record("new")])
    copy.delete(["r5"])
    assert imported(copy, content, format) == {"created": 1, "updated": 1, "unchanged": 1298}
    assert copy.count() == 1301


@pytest.mark.parametrize("format", FORMATS)
def test_another_model_or_other_spaces(
    collections: CollectionSet,
    collection: Collection,
    format: Format,  # noqa: A002
) -> None:
    fill(collection, 2)
    content = exported(collection, format)
    other = collections.create("other-model", spaces=SPACES, model="sha256:other")
    with pytest.raises(ModelMismatch, match=f"f holds .*{MODEL}.*'sha256:other'.*'other-model'"):
        imported(other, content, format)
    larger = collections.create("larger", spaces={"cls": 5, "copy": 6}, model=MODEL)
    with pytest.raises(InvalidVector, match=r"f has spaces .*4.*'larger' has .*5"):
        imported(larger, content, format)
    with pytest.raises(CollectionExists, match="'larger'"):
        import_new(collections, "larger", io.BytesIO(content), format=format)
    with pytest.raises(InvalidName):
        import_new(collections, "No Name", io.BytesIO(content), format=format)
    assert (other.count(), larger.count()) == (0, 0)
    other.close()
    with pytest.raises(CollectionNotFound, match="closed"):
        export_records(other, io.BytesIO(), format=format)


@pytest.mark.parametrize("format", FORMATS)
def test_the_metric_comes_along(
    collections: CollectionSet,
    format: Format,  # noqa: A002
) -> None:
    collection = collections.create("a", spaces=SPACES, model=MODEL, metric="l2")
    import_new(collections, "b", io.BytesIO(exported(collection, format)), format=format)
    assert collections.get("b").metric == "l2"
    # The vectors are as they were given, so they may go where another metric compares them.
    fill(collection, 2)
    cosine = create(collections, "c")
    assert imported(cosine, exported(collection, format), format)["created"] == 2


def test_a_metric_that_there_is_not(collections: CollectionSet) -> None:
    content = text(HEADER | {"metric": "hamming"}, {"records": 0})
    with pytest.raises(CollectionError, match="hamming"):
        import_new(collections, "b", io.BytesIO(content), format="jsonl")
    assert collections.names() == []


def test_unknown_formats_are_named(collection: Collection) -> None:
    unknown: Any = "csv"
    with pytest.raises(FormatUnavailable, match="'csv'; there are jsonl, parquet"):
        export_records(collection, io.BytesIO(), format=unknown)
    with pytest.raises(FormatUnavailable, match="'csv'"):
        import_records(collection, io.BytesIO(), format=unknown)


def test_an_export_while_records_change(collection: Collection) -> None:
    fill(collection, 600)

    def change(count: int) -> None:
        collection.delete([f"r{number}" for number in range(300, 400)])  # of a later page
        collection.upsert([record("r599", 7000), record("late", 1)])

    file = io.BytesIO()
    assert export_records(collection, file, format="jsonl", progress=change) == 501
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    ids = [line["id"] for line in lines[1:-1]]
    assert len(set(ids)) == len(ids) == 501
    assert lines[-1] == {"records": 501}
    assert ids[-1] == "late"
    assert lines[-3]["vectors"]["cls"] == pytest.approx(vectors(7000)["cls"].tolist())


def test_records_go_one_by_one_and_come_in_batches(
    collections: CollectionSet, collection: Collection
) -> None:
    fill(collection, 1100)
    file, written, read = io.BytesIO(), list[int](), list[int]()
    export_records(
        collection, file, format="jsonl", progress=lambda count: written.append(file.tell())
    )
    assert len(set(written)) == 1100
    assert written[0] < 1000
    file.seek(0)
    import_new(
        collections, "b", file, format="jsonl", progress=lambda count: read.append(file.tell())
    )
    assert written[998] <= read[0] <= written[1001]
