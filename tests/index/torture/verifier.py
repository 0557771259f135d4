"""What is there after a kill, looked at through the collection's public face alone."""

import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from index.collection import Collection, Record
from index.collection_set import CollectionSet
from tests.index.torture.ledger import (
    MODEL,
    NAME,
    SPACES,
    WRITERS,
    Item,
    State,
    Taken,
    Vectors,
    metadata_of,
    thumbnail_of,
    vectors_of,
)
from tests.index.torture.writer import POLICY

_PAGE = 997
_THUMBNAILS = 50
# By an index that does not look at everything. It is set to a recall of 0.99 by a sample of 200,
# and anew only when its rows have grown by a third.
_MISSED_SHARE = 0.02
_NEVER = ("checksum differs", "bytes, not")  # refusals of an index that no kill may lead to


@dataclass
class Found:
    """What a look at the folder gave.

    Attributes:
        recovery_s: how long opening it took.
        taken_up: indexes on disk that were put to use at the start; `refused`: that were not.
        removed: rows in them whose records had gone.
        missed: records that an index that is not exact did not find by their own vector.
    """

    states: list[State]
    settings: dict[str, Any] = field(default_factory=dict)
    snapshots: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    recovery_s: float = 0.0
    taken_up: int = 0
    refused: int = 0
    removed: int = 0
    searched: int = 0
    missed: int = 0
    kinds: list[str] = field(default_factory=list)


class _Remembering(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def look(root: Path, *, chance: random.Random, leaves_open: bool = False) -> Found:
    """Open the folder and check everything in it that can be checked without knowing more.

    `leaves_open` is for a process that ends after it: then the next start finds all as it is now.
    """
    logged = _Remembering()
    logging.getLogger().addHandler(logged)
    started = time.monotonic()
    collections = CollectionSet(root, policy=POLICY)
    found = Found([{} for _ in range(WRITERS)], recovery_s=time.monotonic() - started)
    try:
        _look_into(collections, found, logged, chance)
    finally:
        if not leaves_open:
            collections.close()
        logging.getLogger().removeHandler(logged)
    for record in logged.records:
        text = record.getMessage()
        if record.levelno >= logging.ERROR or any(words in text for words in _NEVER):
            found.faults.append(f"logged: {text}")
    return found


def look_at_snapshot(root: Path, name: str, taken: Taken) -> list[str]:
    """Restore a snapshot, in a copy of the folder; what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy)
        with CollectionSet(copy, policy=POLICY) as collections:
            collection = collections.restore(NAME, name)
            found = Found([{} for _ in range(WRITERS)])
            _look_at_records(collection, found, random.Random(0))
    for owner, state in enumerate(found.states):
        if all(state != candidate for candidate in taken.candidates(owner)):
            found.faults.append(f"writer {owner}'s records are those of no moment of its making")
    if taken.count not in (None, sum(map(len, found.states))):
        found.faults.append(f"{taken.count} records were told of")
    return [f"snapshot {name}: {fault}" for fault in found.faults]


def _look_into(
    collections: CollectionSet, found: Found, logged: _Remembering, chance: random.Random
) -> None:
    found.faults += [f"damaged: {error}" for error in collections.damaged.values()]
    found.refused = len(logged.records)
    collection = collections.get_or_create(NAME, spaces=SPACES, model=MODEL)
    stats = collection.stats()
    found.taken_up = sum(each.saved_rows > 0 for each in stats.spaces.values())
    found.removed = stats.removed
    found.settings = collection.settings.to_dict()
    found.snapshots = {each.name: each.count for each in collections.snapshots(NAME)}
    _look_at_records(collection, found, chance)
    found.kinds = [each.kind for each in collection.stats().spaces.values()]
    if chance.random() < 0.1:
        if not collection.wait_until_built(timeout_s=120):
            found.faults.append("building took more than 120 s")
        _search_all(collection, found)
        found.faults += collection.check()


def _look_at_records(collection: Collection, found: Found, chance: random.Random) -> None:
    cursor: str | None = None
    seen = list[str]()
    while True:
        page = collection.scroll(limit=_PAGE, cursor=cursor, with_vectors=True)
        for record in page.records:
            seen.append(record.id)
            found.faults += _faults_of(record)
            state = found.states[record.metadata["owner"]]
            state[record.id] = record.metadata["seed"], record.metadata["group"]
        cursor = page.next_cursor
        if cursor is None:
            break
    found.faults += [f"{id} is there twice" for id, n in Counter(seen).items() if n > 1]  # noqa: A001
    if len(seen) != collection.count():
        found.faults.append(f"{len(seen)} records are listed and {collection.count()} counted")
    items = [(key, *value) for state in found.states for key, value in state.items()]
    for item in chance.sample(items, min(len(items), _THUMBNAILS)):
        if collection.thumbnail(item[0]) != thumbnail_of(item):
            found.faults.append(f"{item[0]} has another thumbnail")
    for owner, state in enumerate(found.states):
        group = chance.randrange(40)
        conditions = [
            {"key": key, "match": {"value": value}}
            for key, value in (("owner", owner), ("group", group))
        ]
        counted = collection.count({"must": conditions})
        if counted != sum(each == group for _, each in state.values()):
            found.faults.append(f"a filter counts {counted} of writer {owner}, group {group}")
    _search_all(collection, found)
    found.faults += collection.check()


def _faults_of(record: Record) -> list[str]:
    metadata: Mapping[str, Any] = record.metadata
    item: Item = (record.id, metadata["seed"], metadata["group"])
    faults = []
    if metadata != metadata_of(item):
        faults.append(f"{record.id} has the metadata {metadata}")
    for space, vector in vectors_of(item[1]).items():
        if record.vectors[space].tobytes() != vector.tobytes():
            faults.append(f"{record.id}: another vector in space {space}")
    return faults


def _search_all(collection: Collection, found: Found) -> None:
    """Each record is the nearest to its own vector."""
    seeds = {seed: key for state in found.states for key, (seed, _) in state.items()}
    if not seeds:
        return
    vectors: dict[int, Vectors] = {seed: vectors_of(seed) for seed in seeds}
    for space in SPACES:
        queries = np.stack([each[space] for each in vectors.values()])
        missed = 0
        for seed, matches in zip(vectors, collection.search_batch(queries, 2, space), strict=True):
            found.searched += 1
            if matches and matches[0].id == seeds[seed] and abs(matches[0].score - 1) < 1e-5:
                continue
            missed += 1
            exactly = {"must": [{"key": "seed", "match": {"value": seed}}]}
            again = collection.search(vectors[seed][space], k=2, space=space, filter=exactly)
            if [match.id for match in again] != [seeds[seed]] or abs(again[0].score - 1) > 1e-5:
                found.faults.append(f"{seeds[seed]} is not found in space {space}, but {again}")
        found.missed += missed
        # The kind may change while this runs, so only one that was asked for all along is known.
        is_exact = collection.settings.kind == "flat" and collection.wait_until_built(timeout_s=0)
        if missed > (0 if is_exact else _MISSED_SHARE * len(seeds)):
            found.faults.append(f"{missed} of {len(seeds)} records are missed in space {space}")
