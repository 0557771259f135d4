"""Random histories, restarts among them, beside a dictionary and brute force."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from index.collection import NewRecord
from index.collection_set import CollectionSet
from index.errors import RecordNotFound
from index.kinds import IndexSettings
from index.maintenance import BuildPolicy
from tests.index.helpers import MODEL, cosines

SPACES = {"cls": 3, "copy": 2}
# All that happens in the background happens all the time.
POLICY = BuildPolicy(save_rows=1, save_share=0, compact_rows=2, compact_share=0, tune_share=0.1)
IDS = st.sampled_from([*"abcdefgh", "é", "日本", "a/../b", "x" * 512])


def numbers(dimension: int) -> st.SearchStrategy[np.ndarray]:
    """Few values, so that ties and exact duplicates are common."""
    values = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0])
    return (
        st.tuples(*[values] * dimension)
        .filter(any)
        .map(lambda drawn: np.array(drawn, dtype=np.float32))
    )


METADATA = st.dictionaries(st.sampled_from("xy"), st.integers(0, 2), max_size=2)
RECORDS = st.builds(
    lambda id, cls, copy, metadata, content: NewRecord(  # noqa: A006
        id, {"cls": cls, "copy": copy}, metadata, content
    ),
    IDS,
    numbers(3),
    numbers(2),
    METADATA,
    st.sampled_from([None, "one", "two", "three"]),
)
KINDS = st.sampled_from(
    [
        IndexSettings(kind="flat"),
        IndexSettings(kind="hnsw", target_recall=1),
        IndexSettings(kind="hnsw", hnsw_m=16, target_recall=1),
        IndexSettings(kind="auto"),
    ]
)
CONDITIONS = st.one_of(
    st.builds(
        lambda key, value: {"key": key, "match": {"value": value}},
        st.sampled_from("xy"),
        st.integers(0, 2),
    ),
    st.builds(
        lambda key, least: {"key": key, "range": {"gte": least}}, st.just("x"), st.integers(0, 2)
    ),
    st.builds(lambda key, there: {"key": key, "exists": there}, st.just("y"), st.booleans()),
)
FILTERS = st.one_of(
    st.none(),
    st.dictionaries(
        st.sampled_from(["must", "should", "must_not"]),
        st.lists(CONDITIONS, min_size=1, max_size=2),
        min_size=1,
        max_size=2,
    ),
)


def holds(condition: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    value = metadata.get(condition["key"])
    if "match" in condition:
        return bool(value == condition["match"]["value"])
    if "range" in condition:
        return value is not None and value >= condition["range"]["gte"]
    return (value is not None) is condition["exists"]


def passes(chosen: Mapping[str, Any] | None, metadata: Mapping[str, Any]) -> bool:
    if chosen is None:
        return True
    should = chosen.get("should", [])
    return (
        all(holds(each, metadata) for each in chosen.get("must", []))
        and (not should or any(holds(each, metadata) for each in should))
        and not any(holds(each, metadata) for each in chosen.get("must_not", []))
    )


class CollectionMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.model: dict[str, NewRecord] = {}  # in order of insertion, like the keys
        self.written: dict[str, int] = {}  # when a record's vectors were written
        self.copies: dict[str, tuple[dict[str, NewRecord], dict[str, int]]] = {}
        self.clock = 0
        self.open()

    def open(self) -> None:
        self.collections = CollectionSet(self.root, policy=POLICY)
        self.collection = self.collections.get_or_create("c", spaces=SPACES, model=MODEL)

    def teardown(self) -> None:
        assert self.collection.check() == []
        self.collections.close()
        shutil.rmtree(self.root)

    def put(self, new: NewRecord, into: str) -> str:
        old = self.model.get(into)
        self.model[into] = NewRecord(into, new.vectors, new.metadata, new.content_hash)
        if old is not None and all(
            np.array_equal(old.vectors[space], new.vectors[space]) for space in SPACES
        ):
            is_same = (old.metadata, old.content_hash) == (new.metadata, new.content_hash)
            return "unchanged" if is_same else "updated"
        self.clock += 1
        self.written[into] = self.clock
        return "created" if old is None else "updated"

    @rule(
        records=st.lists(RECORDS, max_size=6),
        on_duplicate=st.sampled_from(["add", "add", "skip", "update"]),
        replace=st.booleans(),
    )
    def write(self, records: list[NewRecord], on_duplicate: Any, replace: bool) -> None:
        method = self.collection.upsert if replace else self.collection.insert
        outcomes = method(records, on_duplicate=on_duplicate)
        assert [each.id for each in outcomes] == [each.id for each in records]
        for new, got in zip(records, outcomes, strict=True):
            twin = next(
                (
                    each.id
                    for each in self.model.values()
                    if new.content_hash is not None and each.content_hash == new.content_hash
                ),
                None,
            )
            if new.id in self.model:
                expected, same_as = (self.put(new, new.id) if replace else "exists"), None
            elif twin is not None and on_duplicate != "add":
                expected = "skipped" if on_duplicate == "skip" else self.put(new, twin)
                same_as = twin
            else:
                expected, same_as = self.put(new, new.id), None
            assert (got.outcome, got.same_as) == (expected, same_as)

    @rule(ids=st.lists(IDS, max_size=4))
    def delete(self, ids: list[str]) -> None:
        assert self.collection.delete(ids) == len(set(ids) & set(self.model))
        for gone in ids:
            self.model.pop(gone, None)

    @rule(chosen=FILTERS.filter(bool))
    def delete_where(self, chosen: dict[str, Any]) -> None:
        gone = [each.id for each in self.model.values() if passes(chosen, each.metadata)]
        assert self.collection.delete_where(chosen) == len(gone)
        for each in gone:
            del self.model[each]

    @rule(id=IDS)
    def get(self, id: str) -> None:  # noqa: A002
        if id in self.model:
            record = self.collection.get(id, with_vectors=True)
            assert record.metadata == self.model[id].metadata
            for space in SPACES:
                np.testing.assert_array_equal(record.vectors[space], self.model[id].vectors[space])
        else:
            try:
                self.collection.get(id)
            except RecordNotFound:
                return
            raise AssertionError("found a record that was deleted")

    @rule(
        query=numbers(3),
        k=st.integers(1, 15),
        chosen=FILTERS,
        exclude=st.lists(IDS, max_size=3),
    )
    def search(
        self, query: np.ndarray, k: int, chosen: dict[str, Any] | None, exclude: list[str]
    ) -> None:
        self.compare("cls", query, k, chosen, exclude)

    @rule(query=numbers(2), k=st.integers(1, 15))
    def search_copies(self, query: np.ndarray, k: int) -> None:
        self.compare("copy", query, k, None, [])

    def compare(
        self,
        space: str,
        query: np.ndarray,
        k: int,
        chosen: dict[str, Any] | None,
        exclude: list[str],
    ) -> None:
        ids = [
            each.id
            for each in self.model.values()
            if each.id not in exclude and passes(chosen, each.metadata)
        ]
        found = self.collection.search(query, k=k, space=space, filter=chosen, exclude=exclude)
        assert len(found) == min(k, len(ids))
        if not found:
            return
        rows = np.stack([np.asarray(self.model[each].vectors[space]) for each in ids])
        truth = dict(zip(ids, cosines(query, rows).tolist(), strict=True))
        assert [match.score for match in found] == sorted(
            [match.score for match in found], reverse=True
        )
        for match in found:
            assert abs(match.score - truth[match.id]) < 1e-5
            assert match.metadata == self.model[match.id].metadata
        last = found[-1]
        is_flat = self.collection.stats().spaces[space].kind == "flat"
        for left_out in set(ids) - {match.id for match in found}:
            assert truth[left_out] < last.score + 1e-5
            same = np.array_equal(
                self.model[left_out].vectors[space], self.model[last.id].vectors[space]
            )
            if is_flat and same:
                assert self.written[left_out] > self.written[last.id]

    @rule(limit=st.integers(1, 5), chosen=FILTERS)
    def scroll(self, limit: int, chosen: dict[str, Any] | None) -> None:
        seen, cursor = list[str](), None
        while True:
            page = self.collection.scroll(cursor=cursor, limit=limit, filter=chosen)
            seen += [each.id for each in page.records]
            cursor = page.next_cursor
            if cursor is None:
                break
            assert len(page.records) == limit
        expected = [each.id for each in self.model.values() if passes(chosen, each.metadata)]
        assert seen == expected
        assert self.collection.count(chosen) == len(expected)

    @rule()
    def restart(self) -> None:
        assert self.collection.check() == []
        self.collections.close()
        self.open()

    @rule(settings=KINDS)
    def change_kind(self, settings: IndexSettings) -> None:
        self.collection.configure(settings)

    @rule()
    def rebuild(self) -> None:
        self.collection.rebuild()

    @rule()
    def wait(self) -> None:
        assert self.collection.wait_until_built(timeout_s=30)
        for space in self.collection.stats().spaces.values():
            wanted = self.collection.settings.kind
            assert space.kind == ("flat" if wanted == "auto" else wanted)
            assert space.pending == 0
            assert space.recall in (None, 1.0)

    @precondition(lambda self: len(self.copies) < 3)
    @rule()
    def snapshot(self) -> None:
        taken = self.collections.snapshot("c")
        self.copies[taken.name] = dict(self.model), dict(self.written)
        assert [each.name for each in self.collections.snapshots("c")] == list(self.copies)

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), is_lost=st.booleans())
    def restore(self, data: st.DataObject, is_lost: bool) -> None:
        if is_lost:
            self.collections.delete("c")
        name = data.draw(st.sampled_from(list(self.copies)))
        self.collection = self.collections.restore("c", name)
        model, written = self.copies[name]
        self.model, self.written = dict(model), dict(written)

    @invariant()
    def count(self) -> None:
        assert self.collection.count() == len(self.model)


CollectionMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestCollection = CollectionMachine.TestCase
