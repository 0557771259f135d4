import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index import writes
from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet
from index.errors import (
    CollectionNotFound,
    InvalidRecord,
    InvalidVector,
    RecordNotFound,
)
from tests.index.helpers import MODEL, SPACES, create, fill, outcomes, record, vectors


def test_a_record_comes_back_as_it_was_given(collection: Collection) -> None:
    before = time.time()
    metadata = {"b": [1, 2.5, None, True], "a": {"ü": "日本"}}
    new = NewRecord("a.jpg", vectors(1), metadata, "abc")
    assert outcomes(collection, new) == ["created"]
    got = collection.get("a.jpg", with_vectors=True)
    assert (got.id, got.metadata, got.content_hash) == ("a.jpg", metadata, "abc")
    assert before <= got.created_at == got.updated_at <= time.time()
    for space, vector in vectors(1).items():
        assert got.vectors[space].dtype == np.float32
        np.testing.assert_array_equal(got.vectors[space], vector)  # as given, not normalised
    assert collection.get("a.jpg").vectors == {}


def test_outcomes(collection: Collection) -> None:
    assert outcomes(collection, record("a", 1, x=1, y=2), record("b", 2)) == ["created"] * 2
    created = collection.get("a")
    assert outcomes(collection, record("a", 1, y=2, x=1)) == ["unchanged"]
    assert collection.get("a").updated_at == created.updated_at
    assert outcomes(collection, record("a", 1, x=1)) == ["updated"]
    assert outcomes(collection, NewRecord("a", vectors(1), {"x": 1}, "other")) == ["updated"]
    changed = vectors(1) | {"copy": vectors(9)["copy"]}
    assert outcomes(collection, NewRecord("a", changed, {"x": 1}, "other")) == ["updated"]
    assert outcomes(collection, NewRecord("a", changed, {"x": True}, "other")) == ["updated"]
    after = collection.get("a")
    assert after.created_at == created.created_at < after.updated_at
    assert collection.count() == 2
    assert collection.upsert([]) == []


@pytest.mark.parametrize("length", [1e-25, 1e25])
def test_the_same_content_with_another_vector_of_any_length(
    collection: Collection, length: float
) -> None:
    first, second = (
        {space: (vector * length).astype(np.float32) for space, vector in vectors(seed).items()}
        for seed in (1, 2)
    )
    assert outcomes(collection, NewRecord("a", first, {}, "same")) == ["created"]
    assert outcomes(collection, NewRecord("a", second, {}, "same")) == ["updated"]


@pytest.mark.parametrize(
    ("content_hash", "by", "expected"),
    [("same", 1e-6, "unchanged"), ("same", 1e-3, "updated"), (None, 1e-6, "updated")],
)
def test_the_same_content_with_other_rounding(
    collection: Collection, content_hash: str | None, by: float, expected: str
) -> None:
    first = vectors(1)
    second = {space: (vector * (1 + by)).astype(np.float32) for space, vector in first.items()}
    assert outcomes(collection, NewRecord("a", first, {}, content_hash)) == ["created"]

    assert outcomes(collection, NewRecord("a", second, {}, content_hash)) == [expected]

    kept = first if expected == "unchanged" else second
    got = collection.get("a", with_vectors=True)
    np.testing.assert_array_equal(got.vectors["cls"], kept["cls"])


def test_of_an_id_twice_in_one_call_the_last_stays(collection: Collection) -> None:
    assert outcomes(collection, record("a", 1), record("a", 2), record("a", 2), record("b", 3)) == [
        "created",
        "updated",
        "unchanged",
        "created",
    ]
    assert collection.count() == 2
    assert collection.get("a").content_hash == "hash-2"
    (match,) = collection.search(vectors(2)["cls"], k=1)
    assert match.id == "a"
    assert match.score == pytest.approx(1)


def test_an_upsert_is_all_or_nothing(collection: Collection) -> None:
    fill(collection, 3)
    with pytest.raises(InvalidVector, match=r"'bad'.*'cls'.*\[4\].*\[5\]"):
        collection.upsert([record("new"), NewRecord("bad", vectors(1) | {"cls": np.ones(5)})])
    assert collection.count() == 3
    with pytest.raises(RecordNotFound, match="'new'"):
        collection.get("new")


def test_a_failed_transaction_leaves_nothing(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 3)
    write, written = writes._vector_rows, list[int]()

    def fail_at_the_second(*arguments: Any) -> Any:
        written.append(1)
        if len(written) == 2:
            raise MemoryError
        return write(*arguments)

    monkeypatch.setattr(writes, "_vector_rows", fail_at_the_second)
    with pytest.raises(MemoryError):
        collection.upsert([record("x", 7), record("y", 8)])
    assert collection.count() == len(collection.scroll(limit=10).records) == 3
    assert outcomes(collection, record("x", 7)) == ["created"]


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.zeros(4), "zeros"),
        ([1, np.nan, 0, 0], "NaN"),
        ([1, np.inf, 0, 0], "infinity"),
        (np.array([1e300, 0, 0, 0]), "infinity"),
        (np.ones(3), r"expected shape \[4\], got \[3\]"),
        (np.ones((1, 4)), r"expected shape \[4\], got \[1, 4\]"),
        (["a", "b", "c", "d"], "real numbers"),
        (np.ones(4, dtype=complex), "complex128"),
        ([[1], [1, 2]], "not an array of numbers"),
    ],
)
def test_vectors_that_do_not_fit(collection: Collection, vector: Any, message: str) -> None:
    with pytest.raises(InvalidVector, match=message) as raised:
        collection.upsert([NewRecord("the-id", vectors(1) | {"cls": vector})])
    assert "'the-id'" in str(raised.value)
    assert "'cls'" in str(raised.value)
    with pytest.raises(InvalidVector, match=message):
        collection.search(vector, k=1)


def test_spaces_that_do_not_fit(collection: Collection) -> None:
    for given in ({"cls": np.ones(4)}, vectors(1) | {"other": np.ones(4)}, {}):
        with pytest.raises(InvalidVector, match=r"'x'.*\['cls', 'copy'\]"):
            collection.upsert([NewRecord("x", given)])
    with pytest.raises(InvalidVector, match=r"'other'.*\['cls', 'copy'\]"):
        collection.search(np.ones(4), k=1, space="other")
    with pytest.raises(InvalidVector, match="row 1"):
        collection.search_batch([[1, 0, 0, 0], [0, 0, 0, 0]], 1)


@pytest.mark.parametrize("bad", ["", "x" * 513, "a\nb", "a\0b", "\x7f", "\x85", "\ud800", 7, None])
def test_ids_that_cannot_be(collection: Collection, bad: Any) -> None:
    with pytest.raises(InvalidRecord):
        collection.upsert([record(bad)])
    with pytest.raises(RecordNotFound):
        collection.get(bad)
    assert collection.delete([bad]) == 0


@pytest.mark.parametrize(
    "good",
    [
        "x" * 512,
        "../../etc/passwd",
        "a b",
        "日本/👩‍👩‍👧.jpg",
        "'; DROP--",
        "é",
        "e\u0301",
        "\uffff",
    ],
)
def test_ids_that_can_be(collection: Collection, good: str) -> None:
    collection.upsert([record(good, 1), record("other", 2)])
    assert collection.get(good).id == good
    assert [each.id for each in collection.search(vectors(1)["cls"], k=1)] == [good]
    assert [each.id for each in collection.search(vectors(1)["cls"], k=1, exclude=[good])] == [
        "other"
    ]
    assert collection.delete([good]) == 1


def deep() -> Any:
    nested: Any = 1
    for _ in range(100_000):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    "metadata",
    [
        [1],
        None,
        "text",
        {1: "a"},
        {"a": {1: 2}},
        {"a": (1, 2)},
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": object()},
        {"a": b"x"},
        {"a": "\ud800"},
        {"a": deep()},
        {"a": np.ones(2)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_metadata_that_is_not_json(collection: Collection, metadata: Any) -> None:
    with pytest.raises(InvalidRecord, match=r"'x'.*JSON object"):
        collection.upsert([NewRecord("x", vectors(1), metadata)])


def test_metadata_must_not_be_deeper_than_can_be_read(collection: Collection) -> None:
    def nested(levels: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for level in range(levels - 1):
            made = {"a": [made]} if level % 2 else {"a": made}
        return made

    collection.upsert([NewRecord("a", vectors(1), {"a": nested(30)})])
    assert collection.search(vectors(1)["cls"], k=1)[0].metadata == {"a": nested(30)}
    with pytest.raises(InvalidRecord, match="nested deeper than 64 levels"):
        collection.upsert([NewRecord("a", vectors(1), {"a": nested(900)})])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_vectors_whose_scores_would_be_infinite(collections: CollectionSet, metric: Any) -> None:
    collection = collections.create("x", spaces={"cls": 2}, model=MODEL, metric=metric)
    collection.upsert([NewRecord("a", {"cls": [0, 3e18]}), NewRecord("b", {"cls": [0, -3e18]})])
    found = collection.search(np.array([0, 3e18]), k=5)
    assert [match.id for match in found] == ["a", "b"]
    assert all(np.isfinite(match.score) for match in found)
    for wrong in ([3e18, 3e18], [1e38, 0]):
        with pytest.raises(InvalidVector, match=r"expected a length below 3\.2e\+18"):
            collection.upsert([NewRecord("c", {"cls": wrong})])
        with pytest.raises(InvalidVector, match="expected a length below"):
            collection.search(wrong, k=1)


def test_content_hash_must_be_text(collection: Collection) -> None:
    wrong: Any = 5
    with pytest.raises(InvalidRecord, match="content_hash"):
        collection.upsert([NewRecord("x", vectors(1), {}, wrong)])
    collection.upsert([NewRecord("x", vectors(1))])
    assert collection.get("x").content_hash is None


def test_the_callers_array_may_change_afterwards(collection: Collection) -> None:
    given = vectors(1)
    collection.upsert([NewRecord("x", given)])
    given["cls"][:] = 0
    np.testing.assert_array_equal(
        collection.get("x", with_vectors=True).vectors["cls"], vectors(1)["cls"]
    )


def test_delete_says_how_many_there_were(collection: Collection) -> None:
    fill(collection, 5)
    assert collection.delete(["r1", "r3", "r1", "nobody"]) == 2
    assert collection.delete([]) == 0
    assert collection.count() == 3
    found = collection.search(vectors(1)["cls"], k=10)
    assert sorted(match.id for match in found) == ["r0", "r2", "r4"]
    with pytest.raises(TypeError, match="list of ids"):
        collection.delete("r0")


def test_everything_is_there_after_a_restart(root: Path) -> None:
    with CollectionSet(root) as collections:
        collection = create(collections)
        fill(collection, 20)
        collection.delete(["r4"])
        before = collection.search(vectors(3)["copy"], k=20, space="copy")
        created_at = collection.created_at
    with CollectionSet(root) as collections:
        collection = collections.get("pictures")
        assert collection.search(vectors(3)["copy"], k=20, space="copy") == before
        assert (collection.name, collection.model, collection.spaces, collection.created_at) == (
            "pictures",
            MODEL,
            SPACES,
            created_at,
        )


def test_threads_may_share_a_collection(collection: Collection) -> None:
    fill(collection, 20)
    faults = list[BaseException]()

    def work(number: int) -> None:
        try:
            for turn in range(8):
                name = f"t{number}-{turn}"
                collection.upsert([record(name, 1000 + 10 * number + turn)])
                query = vectors(1000 + 10 * number + turn)["cls"]
                assert collection.search(query, k=1)[0].id == name
                assert collection.get(name).id == name
                collection.scroll(limit=5)
                assert collection.delete([name]) == 1
                assert name not in {match.id for match in collection.search(query, k=20)}
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert collection.count() == 20


def test_closing_waits_for_readers(collection: Collection) -> None:
    fill(collection, 2)
    closing = threading.Thread(target=collection.close)
    with collection._store.database.reading() as connection:
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        assert connection.execute("SELECT count(*) FROM records").fetchone() == (2,)
    closing.join(10)
    assert not closing.is_alive()


def test_a_closed_collection_says_so(collection: Collection) -> None:
    fill(collection, 2)
    collection.close()
    collection.close()
    for use in (
        lambda: collection.search(vectors(0)["cls"], k=1),
        lambda: collection.upsert([record("x")]),
        lambda: collection.delete(["r0"]),
        lambda: collection.get("r0"),
        lambda: collection.scroll(limit=1),
        collection.count,
    ):
        with pytest.raises(CollectionNotFound, match="closed or deleted"):
            use()
