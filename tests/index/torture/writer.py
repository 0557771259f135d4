"""The process that is killed: all that a collection can do, from several threads at once."""

import itertools
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from index.collection import Collection
from index.collection_set import CollectionSet
from index.kinds import IndexSettings
from index.maintenance import BuildPolicy
from tests.index.torture.ledger import (
    GROUPS,
    IDS,
    MODEL,
    NAME,
    SPACES,
    WRITERS,
    Item,
    Ledger,
    Operation,
    State,
    new_record,
    vectors_of,
)

# All that happens in the background happens all the time.
POLICY = BuildPolicy(
    save_rows=200, save_share=0, compact_rows=500, compact_share=0.1, tune_share=0.3
)
KINDS = (
    IndexSettings(kind="flat"),
    IndexSettings(kind="hnsw", hnsw_m=8, ef_construction=16),
    IndexSettings(kind="hnsw", hnsw_m=12, ef_construction=16),
    IndexSettings(kind="ivf_sq8", lists=32),
)
_SNAPSHOTS = 3
_MANAGER = WRITERS  # the owner of operations that concern no record


class Pipe:
    """Lines to whoever listens, whole ones, from many threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def say(self, *line: Any) -> None:
        text = f"{json.dumps(line)}\n".encode()
        with self._lock:
            while text:
                text = text[os.write(self._descriptor, text) :]


class Teller:
    """Runs operations, each told before and after."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._numbers = itertools.count()

    def run(self, owner: int, method: str, given: Any, do: Callable[[], Any]) -> Any:
        number = next(self._numbers)
        self._pipe.say("intends", number, owner, method, given)
        answer = do()
        self._pipe.say("done", number, answer)
        return answer


class _Telling(logging.Handler):
    """What is logged as an error is a fault as well."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(logging.ERROR)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.say("fault", self.format(record))


def work(
    root: Path,
    descriptor: int,
    *,
    ledger: Ledger,
    chance: random.Random,
    first_seed: int,
    limit: int,
) -> None:
    """Write until killed, going on from what `ledger` says is there.

    Args:
        descriptor: the pipe's end to write to.
        first_seed: of this and the 2^20 - 1 after it no vectors were made before.
        limit: how many records each thread holds, about.
    """
    pipe = Pipe(descriptor)
    logging.basicConfig(handlers=[_Telling(pipe)], force=True)
    collections = CollectionSet(root, policy=POLICY)
    collection = collections.get_or_create(NAME, spaces=SPACES, model=MODEL)
    pipe.say("opened")
    teller = Teller(pipe)

    def guarded(target: Callable[..., None], *arguments: Any) -> None:
        try:
            target(*arguments)
        except BaseException as error:
            pipe.say("fault", f"{target.__name__}: {error!r}")
            raise

    for owner, state in enumerate(ledger.states):
        seeds = itertools.count(first_seed + (owner << 17))
        writer = _Writer(collection, teller, owner, dict(state), seeds, chance.random(), limit)
        threading.Thread(target=guarded, args=(writer.work,)).start()
    own = random.Random(chance.random())
    guarded(_manage, collections, teller, own, list(ledger.snapshots))


class _Writer:
    def __init__(
        self,
        collection: Collection,
        teller: Teller,
        owner: int,
        state: State,
        seeds: Iterator[int],
        chance: float,
        limit: int,
    ) -> None:
        self._collection = collection
        self._teller = teller
        self._owner = owner
        self._state = state
        self._seeds = seeds
        self._chance = random.Random(chance)
        self._limit = limit

    def work(self) -> None:
        while True:
            is_full = len(self._state) >= self._limit
            choices = [self._delete] * (4 if is_full else 1) + [self._delete_where]
            choices += [self._change] * 2 + [self._relabel, self._insert]
            if not is_full:
                choices += [self._add] * 4
            self._chance.choice(choices)()

    def _add(self) -> None:
        most = 120 if len(self._state) < self._limit * 0.8 else 30
        taken = (self._new_id() for _ in range(self._chance.randint(1, most)))
        self._write("upsert", [self._item(key) for key in dict.fromkeys(taken)])

    def _change(self) -> None:
        """New vectors for some that are there, beside new ones; one id may stand there twice."""
        keys = [*self._some(15), *(self._new_id() for _ in range(3))]
        self._write("upsert", [self._item(key) for key in keys])

    def _relabel(self) -> None:
        """The same vectors with other metadata, and one record as it is."""
        items = [(key, self._state[key][0], self._group()) for key in self._some(15)]
        items += [(key, *self._state[key]) for key in self._some(1)]
        self._write("upsert", items)

    def _insert(self) -> None:
        keys = dict.fromkeys([*self._some(5), *(self._new_id() for _ in range(5))])
        self._write("insert", [self._item(key) for key in keys])

    def _delete(self) -> None:
        keys = [*self._some(80), self._new_id()]
        self._run("delete", keys, lambda: self._collection.delete(keys))

    def _delete_where(self) -> None:
        group = self._group()
        conditions = [
            {"key": key, "match": {"value": value}}
            for key, value in (("owner", self._owner), ("group", group))
        ]
        chosen = {"must": conditions}
        self._run("delete_where", group, lambda: self._collection.delete_where(chosen))

    def _write(self, method: str, items: list[Item]) -> None:
        if not items:
            return
        records = [new_record(item) for item in items]
        write = self._collection.upsert if method == "upsert" else self._collection.insert
        self._run(method, items, lambda: [each.outcome for each in write(records)])
        key = items[-1][0]
        self._look_for(key, self._state[key][0])

    def _look_for(self, key: str, seed: int) -> None:
        """What was written a moment ago is searchable: exactly, where the filter leaves one row."""
        only = {"must": [{"key": "seed", "match": {"value": seed}}]}
        (match,) = self._collection.search(vectors_of(seed)["cls"], k=1, filter=only)
        if match.id != key or abs(match.score - 1) > 1e-5:
            raise AssertionError(f"searched for {key}, found {match}")

    def _run(self, method: str, given: Any, do: Callable[[], Any]) -> None:
        self._teller.run(self._owner, method, given, do)
        self._state = Operation(0, self._owner, method, given).after(self._state)

    def _some(self, most: int) -> list[str]:
        keys = list(self._state)
        return self._chance.sample(keys, min(len(keys), self._chance.randint(1, most)))

    def _new_id(self) -> str:
        while (key := f"{self._owner}/{self._chance.randrange(IDS)}") in self._state:
            pass
        return key

    def _item(self, key: str) -> Item:
        return key, next(self._seeds), self._group()

    def _group(self) -> int:
        return self._chance.randrange(GROUPS)


def _manage(
    collections: CollectionSet, teller: Teller, chance: random.Random, snapshots: list[str]
) -> None:
    """Change the index, build it anew, take snapshots and let old ones go, without end."""
    collection = collections.get(NAME)
    while True:
        time.sleep(chance.uniform(0, 0.4))
        choice = chance.choice(["configure", "rebuild", "snapshot", "snapshot"])
        if choice == "configure":
            settings = chance.choice(KINDS)
            given = settings.to_dict()
            teller.run(_MANAGER, "configure", given, _calling(collection.configure, settings))
        elif choice == "rebuild":
            teller.run(_MANAGER, "rebuild", None, collection.rebuild)
        elif len(snapshots) >= _SNAPSHOTS:
            name = snapshots.pop(chance.randrange(len(snapshots)))
            deleting = _calling(collections.delete_snapshot, NAME, name)
            teller.run(_MANAGER, "delete_snapshot", name, deleting)
        else:
            name, _ = teller.run(_MANAGER, "snapshot", None, lambda: _snapshot(collections))
            snapshots.append(name)


def _snapshot(collections: CollectionSet) -> tuple[str, int]:
    made = collections.snapshot(NAME)
    return made.name, made.count


def _calling(method: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: method(*arguments)
