import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from index.collection_set import CollectionSet
from index.store import FILE_NAME
from tests.index.helpers import REPOSITORY
from tests.index.torture.ledger import MODEL, NAME, SPACES, Ledger, Operation, Taken, new_record
from tests.index.torture.verifier import look


def test_a_few_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.index.torture", "--json", "--folder", str(tmp_path)]
    command += ["--kills", "6", "--records", "800"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["kills"], told["faults"]) == (6, 0)
    assert told["writes_acknowledged"] > 0
    assert told["searches"] > 0


def ledger() -> Ledger:
    """Of one writer: two records are there, and a third and a fourth are being written."""
    ledger = Ledger()
    ledger.intend(Operation(0, 0, "upsert", [("0/a", 1, 0), ("0/b", 2, 0), ("0/c", 3, 1)]))
    ledger.acknowledge(0, ["created"] * 3)
    ledger.intend(Operation(1, 0, "delete_where", 1))
    ledger.acknowledge(1, 1)
    ledger.intend(Operation(2, 0, "upsert", [("0/d", 4, 0), ("0/e", 5, 0)]))
    assert ledger.faults == []
    return ledger


BEFORE = {"0/a": (1, 0), "0/b": (2, 0)}
AFTER = BEFORE | {"0/d": (4, 0), "0/e": (5, 0)}


def test_what_was_under_way_is_there_or_not() -> None:
    assert ledger().settle(0, BEFORE) is None
    assert ledger().settle(0, AFTER) is None


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"0/a": (1, 0)}, "0/b is None, not (2, 0)"),
        (BEFORE | {"0/b": (7, 0)}, "0/b is (7, 0), not (2, 0)"),
        (BEFORE | {"0/c": (3, 1)}, "0/c is (3, 1), not None"),  # it was deleted
        (BEFORE | {"0/d": (4, 0)}, "0/d"),  # half of a batch
        ({}, "0/a is None, not (1, 0); 0/b is None"),
    ],
)
def test_what_must_not_be_is_told(found: dict[str, tuple[int, int]], fault: str) -> None:
    told = ledger().settle(0, found)
    assert told is not None
    assert fault in told


def test_a_wrong_answer_is_told() -> None:
    told = ledger()
    told.acknowledge(2, ["created", "updated"])
    assert len(told.faults) == 1


def test_a_snapshot_is_of_a_moment_of_its_making() -> None:
    first, second = (Operation(n, 0, "upsert", [(f"0/{n}", n, 0)]) for n in (1, 2))
    taken = Taken([{"0/0": (0, 0)}], [[first, second]])
    assert [sorted(each) for each in taken.candidates(0)] == [
        ["0/0"],
        ["0/0", "0/1"],
        ["0/0", "0/1", "0/2"],
    ]


@pytest.fixture
def tampered(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The file of a collection in `tmp_path`, of twenty records, to be spoilt."""
    with CollectionSet(tmp_path) as collections:
        collection = collections.create(NAME, spaces=SPACES, model=MODEL)
        collection.upsert([new_record((f"0/{number}", number, number)) for number in range(20)])
    with closing(sqlite3.connect(tmp_path / NAME / FILE_NAME)) as connection:
        yield connection


def test_a_look_at_what_is_whole(tampered: sqlite3.Connection, tmp_path: Path) -> None:
    found = look(tmp_path, chance=random.Random(0))
    assert found.faults == []
    assert found.states[0] == {f"0/{number}": (number, number) for number in range(20)}
    assert found.searched == 40


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE vectors_0 SET vector = (SELECT vector FROM vectors_0 WHERE row = 2) WHERE row = 1",
         "0/0: another vector in space cls"),
        ("UPDATE records SET metadata = replace(metadata, 'group\": 3,', 'group\": 4,')",
         "0/3 has another thumbnail"),
        ("DELETE FROM thumbnails", "no thumbnail"),
        ("INSERT INTO vectors_1 SELECT 99, vector FROM vectors_1 WHERE row = 1",
         "20 records have 21 vectors"),
    ],
)  # fmt: skip
def test_a_look_finds_faults(
    tampered: sqlite3.Connection, tmp_path: Path, statement: str, fault: str
) -> None:
    tampered.execute(statement)
    tampered.commit()
    try:
        found = look(tmp_path, chance=random.Random(0)).faults
    except Exception as error:  # a fault as well, for the one who kills
        found = [str(error)]
    assert any(fault in each for each in found), found
