"""What the collection must hold, by what the killed process said.

The writer says each operation twice on a pipe: as it intends it, and when the method has returned.
Each thread of it owns some of the ids, and its operations follow one another, so that at a kill one
operation of each thread may be under way: done, or not, and nothing in between.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from index.collection import NewRecord

NAME = "tortured"
MODEL = "sha256:a-model"
SPACES = {"cls": 16, "copy": 8}
WRITERS = 4
GROUPS = 40
IDS = 2000  # of one writer; more than it has records, so that ids come back with other vectors

Item: TypeAlias = tuple[str, int, int]  # an id, the seed of its vectors, its group
State: TypeAlias = dict[str, tuple[int, int]]  # id -> seed and group
Vectors: TypeAlias = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Operation:
    """One call of a method: its name, of whose records, and what it was given."""

    number: int
    owner: int
    method: str
    given: Any

    def after(self, state: State) -> State:
        """What the owner's records are once it is done."""
        if self.method not in ("upsert", "insert", "delete", "delete_where"):
            return state
        state = dict(state)
        if self.method == "delete":
            for each in self.given:
                state.pop(each, None)
        elif self.method == "delete_where":
            state = {key: value for key, value in state.items() if value[1] != self.given}
        else:
            for key, seed, group in self.given:
                if self.method == "upsert" or key not in state:
                    state[key] = seed, group
        return state

    def answer(self, state: State) -> Any:
        """What the method must return, found the records so."""
        if self.method == "delete":
            return len(set(self.given) & set(state))
        if self.method == "delete_where":
            return sum(group == self.given for _, group in state.values())
        if self.method not in ("upsert", "insert"):
            return None
        outcomes, state = [], dict(state)
        for key, seed, group in self.given:
            if key not in state:
                outcomes.append("created")
            elif self.method == "insert":
                outcomes.append("exists")
                continue
            else:
                outcomes.append("unchanged" if state[key] == (seed, group) else "updated")
            state[key] = seed, group
        return outcomes


@dataclass
class Taken:
    """A snapshot, and what its copy may hold of each owner: `window` may be in it, in order."""

    base: list[State]
    window: list[list[Operation]]
    name: str | None = None  # None: nobody was told of it
    count: int | None = None

    def candidates(self, owner: int) -> Iterable[State]:
        """From what was there when it was asked for to what was there when it was done.

        An operation of `window` that a kill left undone follows only what comes before the kill.
        """
        state = self.base[owner]
        yield state
        for operation in self.window[owner]:
            state = operation.after(state)
            yield state


@dataclass
class Ledger:
    """All that was acknowledged, and what was under way."""

    states: list[State] = field(default_factory=lambda: [{} for _ in range(WRITERS)])
    settings: dict[str, Any] = field(default_factory=dict)
    under_way: dict[int, Operation] = field(default_factory=dict)
    snapshots: dict[str, Taken] = field(default_factory=dict)
    taking: Taken | None = None
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def intend(self, operation: Operation) -> None:
        """It is about to begin."""
        self.under_way[operation.number] = operation
        if operation.method == "snapshot":
            window = [[o for o in self.under_way.values() if o.owner == w] for w in range(WRITERS)]
            self.taking = Taken(list(self.states), window)
        elif self.taking is not None and operation.owner < WRITERS:
            self.taking.window[operation.owner].append(operation)

    def acknowledge(self, number: int, answer: Any) -> None:
        """It is done, with this answer."""
        operation = self.under_way.pop(number)
        self.counts[operation.method] = self.counts.get(operation.method, 0) + 1
        if operation.owner < WRITERS:
            state = self.states[operation.owner]
            expected = operation.answer(state)
            if answer != expected:
                self.faults.append(f"{operation} answered {answer}, not {expected}")
            self.states[operation.owner] = operation.after(state)
        elif operation.method == "snapshot":
            assert self.taking is not None
            self.taking.name, self.taking.count = answer
            self.snapshots[answer[0]], self.taking = self.taking, None
        elif operation.method == "delete_snapshot":
            del self.snapshots[operation.given]
        elif operation.method == "configure":
            self.settings = operation.given

    def settle(self, owner: int, found: State) -> str | None:
        """Take over what is there of an owner after a kill; what is wrong with it, or None."""
        state = self.states[owner]
        possible = [state, *(o.after(state) for o in self.under_way.values() if o.owner == owner)]
        if found in possible:
            return None
        best = min(possible, key=lambda each: len(_differences(each, found)))
        return f"records of writer {owner}: {_shown(_differences(best, found))}"

    def begin_again(self, states: Sequence[State], settings: Mapping[str, Any]) -> None:
        """The process was killed, and this is what was found after it."""
        self.states, self.settings = list(states), dict(settings)
        self.under_way.clear()
        self.taking = None


@lru_cache(maxsize=20_000)
def vectors_of(seed: int) -> Vectors:
    """The vectors that a seed stands for: of two seeds never alike."""
    random = np.random.default_rng(seed)
    return {
        space: random.standard_normal(dimension).astype(np.float32)
        for space, dimension in SPACES.items()
    }


def new_record(item: Item) -> NewRecord:
    """The record of an item: all of it follows from the item."""
    key, seed, _ = item
    return NewRecord(key, vectors_of(seed), metadata_of(item), thumbnail=thumbnail_of(item))


def metadata_of(item: Item) -> dict[str, Any]:
    """Its metadata."""
    key, seed, group = item
    return {
        "owner": int(key.partition("/")[0]),
        "group": group,
        "seed": seed,
        "é": "x" * (seed % 9),
    }


def thumbnail_of(item: Item) -> bytes:
    """Its thumbnail."""
    return f"{item}".encode()


def _differences(expected: State, found: State) -> list[str]:
    keys = expected.keys() | found.keys()
    return [
        f"{key} is {found.get(key)}, not {expected.get(key)}"
        for key in sorted(keys)
        if found.get(key) != expected.get(key)
    ]


def _shown(differences: Sequence[str]) -> str:
    more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
    return "; ".join(differences[:5]) + more
