"""The one who kills: starts the writer, kills it at some moment, and has the rest looked at."""

import json
import os
import pickle
import random
import select
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.index.torture.ledger import NAME, WRITERS, Ledger, Operation
from tests.index.torture.verifier import Found, look, look_at_snapshot
from tests.index.torture.writer import work

_MOMENTS = ("any", "any", "any", "opening", "saving", "snapshot")
_RESTORE_SHARE = 0.1
_LONGEST_S = 2.0  # before a kill


class Torture:
    """One collection under a row of kills.

    Attributes:
        faults: what was found that must not be.
        kills: how many there were, and by what was under way at them.
    """

    def __init__(self, root: Path, *, seed: int, records: int) -> None:
        self.faults: list[str] = []
        self.kills: Counter[str] = Counter()
        self._root = root
        self._has_opened = False
        self._records = records
        self._chance = random.Random(seed)
        self._ledger = Ledger()
        self._started = time.monotonic()
        self._recoveries_s: list[float] = []
        self._totals: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()

    @property
    def writes(self) -> int:
        """How many were acknowledged."""
        counts = self._ledger.counts
        return sum(counts.get(method, 0) for method in ("upsert", "insert", *_DELETES))

    def kill_once(self) -> None:
        """Let the writer go on, kill it, and check."""
        self._run_and_kill()
        self._note_what_was_under_way()
        try:
            self._check()
        except RuntimeError as error:
            self.faults.append(str(error))
        self.faults += self._ledger.faults

    def _check(self) -> None:
        chance = random.Random(self._chance.random())
        leaves_open = self._chance.random() < 0.5
        looking = partial(look, self._root, chance=chance, leaves_open=leaves_open)
        self._take_over(_forked(looking))
        names = list(self._ledger.snapshots)
        if names and self._chance.random() < _RESTORE_SHARE:
            name = self._chance.choice(names)
            taken = self._ledger.snapshots[name]
            self.faults += _forked(partial(look_at_snapshot, self._root, name, taken))
            self._totals["restored"] += 1

    def told(self) -> dict[str, Any]:
        """The figures."""
        counts = self._ledger.counts
        recoveries = sorted(self._recoveries_s) or [0.0]
        return {
            "kills": self.kills["all"],
            "kills_while_opening": self.kills["opening"],
            "kills_while_writing": self.kills["writing"],
            "kills_while_saving_an_index": self.kills["saving"],
            "kills_while_taking_a_snapshot": self.kills["snapshot"],
            "writes_acknowledged": self.writes,
            "deletes_among_them": sum(counts.get(method, 0) for method in _DELETES),
            "writes_under_way_at_a_kill": self._totals["under_way"],
            "kept_of_these": self._totals["kept"],
            "kinds_changed": counts.get("configure", 0),
            "rebuilds": counts.get("rebuild", 0),
            "snapshots_taken": counts.get("snapshot", 0),
            "snapshots_restored": self._totals["restored"],
            "records_at_the_end": sum(map(len, self._ledger.states)),
            "kinds_found": dict(self._kinds.most_common()),
            "searches": self._totals["searched"],
            "missed_by_inexact_kinds": self._totals["missed"],
            "indexes_taken_up": self._totals["taken_up"],
            "indexes_not_taken_up": self._totals["refused"],
            "removed_rows_in_them": self._totals["removed"],
            "median_recovery_s": round(recoveries[len(recoveries) // 2], 3),
            "longest_recovery_s": round(recoveries[-1], 3),
            "seconds": round(time.monotonic() - self._started, 1),
            "faults": len(self.faults),
        }

    def _run_and_kill(self) -> None:
        self._has_opened = False
        reading, writing = os.pipe()
        chance = random.Random(self._chance.random())
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                work(
                    self._root,
                    writing,
                    ledger=self._ledger,
                    chance=chance,
                    first_seed=self.kills["all"] << 20,
                    limit=self._records // WRITERS,
                )
            finally:
                os._exit(1)
        os.close(writing)
        try:
            lines = _Lines(reading)
            for line in self._until_the_moment(lines):
                self._hear(line)
            os.kill(child, signal.SIGKILL)
            for line in lines.rest():
                self._hear(line)
        finally:
            os.kill(child, signal.SIGKILL)  # as well when this process is interrupted
            os.close(reading)
            os.waitpid(child, 0)
        self.kills["all"] += 1

    def _until_the_moment(self, lines: "_Lines") -> Iterator[list[Any]]:
        moment = self._chance.choice(_MOMENTS)
        now = time.monotonic()
        at = now + _LONGEST_S * self._chance.random()
        if moment == "opening":
            at = now + 0.1 * self._chance.random()
        elif moment in ("saving", "snapshot"):
            at = now + 2 * _LONGEST_S  # unless it comes before
        pause = self._chance.random()
        while (left := at - time.monotonic()) > 0 and not lines.is_at_end:
            for line in lines.within(min(left, 0.002 if moment == "saving" else 0.02)):
                yield line
                if moment == "snapshot" and line[0] == "intends" and line[3] == "snapshot":
                    at = time.monotonic() + 0.05 * pause
            if moment == "saving" and self._is_saving():
                at, moment = time.monotonic() + 0.03 * pause, "soon"

    def _hear(self, line: list[Any]) -> None:
        what, *rest = line
        if what == "intends":
            number, owner, method, given = rest
            if method in ("upsert", "insert"):
                given = [tuple(item) for item in given]
            self._ledger.intend(Operation(number, owner, method, given))
        elif what == "done":
            self._ledger.acknowledge(*rest)
        elif what == "fault":
            self.faults.append(f"the writer: {rest[0]}")
        elif what == "opened":
            self._has_opened = True

    def _is_saving(self) -> bool:
        index = self._root / NAME / "index"
        return index.is_dir() and any(name.endswith(".new") for name in os.listdir(index))  # noqa: PTH208

    def _note_what_was_under_way(self) -> None:
        under_way = [operation.owner for operation in self._ledger.under_way.values()]
        self.kills["opening"] += not self._has_opened
        self.kills["writing"] += any(owner < WRITERS for owner in under_way)
        self.kills["saving"] += self._is_saving()
        self.kills["snapshot"] += self._ledger.taking is not None
        self._totals["under_way"] += sum(owner < WRITERS for owner in under_way)

    def _take_over(self, found: Found) -> None:
        ledger = self._ledger
        self.faults += found.faults
        for owner, state in enumerate(found.states):
            self._totals["kept"] += any(
                state != ledger.states[owner] and operation.owner == owner
                for operation in ledger.under_way.values()
            )
            fault = ledger.settle(owner, state)
            if fault is not None:
                self.faults.append(fault)
        self._take_over_settings(found)
        self._take_over_snapshots(found)
        ledger.begin_again(found.states, found.settings)
        self._recoveries_s.append(found.recovery_s)
        self._kinds.update(found.kinds)
        for name in ("searched", "missed", "taken_up", "refused", "removed"):
            self._totals[name] += getattr(found, name)

    def _take_over_settings(self, found: Found) -> None:
        under_way = [o.given for o in self._ledger.under_way.values() if o.method == "configure"]
        known = self._ledger.settings
        if known and found.settings not in (known, *under_way):
            self.faults.append(f"settings are {found.settings}, not {known}")

    def _take_over_snapshots(self, found: Found) -> None:
        ledger = self._ledger
        deleting = [o.given for o in ledger.under_way.values() if o.method == "delete_snapshot"]
        for name in list(ledger.snapshots):
            if name in found.snapshots:
                continue
            if name not in deleting:
                self.faults.append(f"snapshot {name} has gone")
            del ledger.snapshots[name]
        for name in found.snapshots.keys() - ledger.snapshots.keys():
            if ledger.taking is None:
                self.faults.append(f"snapshot {name} is there, and nobody took it")
            else:
                ledger.snapshots[name], ledger.taking = ledger.taking, None


_DELETES = ("delete", "delete_where")


class _Lines:
    """Whole lines of JSON as they come through a pipe; the last one may be cut off by a kill."""

    def __init__(self, descriptor: int) -> None:
        self.is_at_end = False
        self._descriptor = descriptor
        self._left = b""

    def within(self, seconds: float) -> Iterator[list[Any]]:
        if select.select([self._descriptor], [], [], seconds)[0]:
            piece = os.read(self._descriptor, 1 << 16)
            self.is_at_end = not piece
            *whole, self._left = (self._left + piece).split(b"\n")
            yield from map(json.loads, whole)

    def rest(self) -> Iterator[list[Any]]:
        while not self.is_at_end:
            yield from self.within(10)


def _forked(do: Callable[[], Any]) -> Any:
    """What `do` returns in a process of its own; what it raises is raised here, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            try:
                answer = pickle.dumps((do(), None))
            except BaseException:
                answer = pickle.dumps((None, traceback.format_exc()))
            with os.fdopen(writing, "wb") as file:
                file.write(answer)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        result, error = pickle.loads(file.read())
    os.waitpid(child, 0)
    if error is not None:
        raise RuntimeError(error)
    return result
