"""Random histories, restarts among them, beside a dictionary and brute force."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from index.collection import NewRecord
from index.collection_set import CollectionSet
from index.errors import RecordNotFound
from tests.index.helpers import MODEL, cosines

DIMENSION = 3
IDS = st.sampled_from([*"abcdefgh", "é", "日本", "a/../b", "x" * 512])
# Few values, so that ties and exact duplicates are common.
VECTORS = (
    st.tuples(*[st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0])] * DIMENSION)
    .filter(any)
    .map(lambda values: np.array(values, dtype=np.float32))
)
METADATA = st.dictionaries(st.sampled_from("xy"), st.integers(0, 2), max_size=2)
RECORDS = st.builds(
    lambda id, vector, metadata: NewRecord(id, {"cls": vector}, metadata),  # noqa: A006
    IDS,
    VECTORS,
    METADATA,
)


class CollectionMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.model: dict[str, NewRecord] = {}  # in order of insertion, like the keys
        self.open()

    def open(self) -> None:
        self.collections = CollectionSet(self.root)
        self.collection = self.collections.get_or_create(
            "c", spaces={"cls": DIMENSION}, model=MODEL
        )

    def teardown(self) -> None:
        self.collections.close()
        shutil.rmtree(self.root)

    @rule(records=st.lists(RECORDS, max_size=6))
    def upsert(self, records: list[NewRecord]) -> None:
        outcomes = self.collection.upsert(records)
        assert [each.id for each in outcomes] == [each.id for each in records]
        for new, got in zip(records, outcomes, strict=True):
            old = self.model.get(new.id)
            if old is None:
                expected = "created"
            elif old.metadata == new.metadata and np.array_equal(
                old.vectors["cls"], new.vectors["cls"]
            ):
                expected = "unchanged"
            else:
                expected = "updated"
            assert got.outcome == expected
            self.model[new.id] = new

    @rule(ids=st.lists(IDS, max_size=4))
    def delete(self, ids: list[str]) -> None:
        assert self.collection.delete(ids) == len(set(ids) & set(self.model))
        for gone in ids:
            self.model.pop(gone, None)

    @rule(id=IDS)
    def get(self, id: str) -> None:  # noqa: A002
        if id in self.model:
            record = self.collection.get(id, with_vectors=True)
            assert record.metadata == self.model[id].metadata
            np.testing.assert_array_equal(record.vectors["cls"], self.model[id].vectors["cls"])
        else:
            try:
                self.collection.get(id)
            except RecordNotFound:
                return
            raise AssertionError("found a record that was deleted")

    @rule(query=VECTORS, k=st.integers(1, 15), exclude=st.lists(IDS, max_size=3))
    def search(self, query: np.ndarray, k: int, exclude: list[str]) -> None:
        ids = [each for each in self.model if each not in exclude]
        found = self.collection.search(query, k=k, exclude=exclude)
        assert len(found) == min(k, len(ids))
        if not found:
            return
        rows = np.stack([np.asarray(self.model[each].vectors["cls"]) for each in ids])
        truth = dict(zip(ids, cosines(query, rows).tolist(), strict=True))
        order = {each: position for position, each in enumerate(ids)}
        got = [(-match.score, order[match.id]) for match in found]
        assert got == sorted(got)
        for match in found:
            assert abs(match.score - truth[match.id]) < 1e-5
            assert match.metadata == self.model[match.id].metadata
        last = found[-1]
        for left_out in set(ids) - {match.id for match in found}:
            assert truth[left_out] < last.score + 1e-5
            same = np.array_equal(
                self.model[left_out].vectors["cls"], self.model[last.id].vectors["cls"]
            )
            assert not same or order[left_out] > order[last.id]

    @rule(limit=st.integers(1, 5))
    def scroll(self, limit: int) -> None:
        seen, cursor = list[str](), None
        while True:
            page = self.collection.scroll(cursor=cursor, limit=limit)
            seen += [each.id for each in page.records]
            cursor = page.next_cursor
            if cursor is None:
                break
            assert len(page.records) == limit
        assert seen == list(self.model)

    @rule()
    def restart(self) -> None:
        self.collections.close()
        self.open()

    @invariant()
    def count(self) -> None:
        assert self.collection.count() == len(self.model)


CollectionMachine.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestCollection = CollectionMachine.TestCase
