"""The power goes: only what was synced is certain to be there, and of the rest any part."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from index.collection_set import CollectionSet
from tests.index.fault_scenarios import batches_in
from tests.index.faulty_disk import build, run_on
from tests.index.power_loss import Disk, Entry, cuts, read_diary

CUTS = 40


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    folder = tmp_path_factory.mktemp("traced")
    root = folder / "root"
    root.mkdir()
    run_on(build(folder), root, "tests.index.traced_writer")
    return read_diary(folder / "root.diary", root)


class Promise:
    """What lines of acknowledgement and intent promise: of each batch whether it must be there."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.has_collection: bool | None = False  # None: either
        self.snapshots = 0
        self.certain = set[int]()
        self.gone = set[int]()
        self.is_restoring = False
        self.is_restored = False
        for line in lines:
            what, method, *given = json.loads(line)
            is_done = what == "done"
            if method == "create":
                self.has_collection = True if is_done else None
            elif method == "upsert":
                if is_done:
                    self.certain.add(given[0])
                else:
                    self.gone.discard(given[0])
            elif method == "delete":
                self.certain.discard(given[0])
                if is_done:
                    self.gone.add(given[0])
            elif method == "snapshot":
                self.snapshots += is_done
            elif method == "restore":
                self.is_restoring = not is_done
                if is_done:  # what the snapshot held exactly is tested elsewhere
                    self.certain.clear()
                    self.gone = {number for number in self.gone if number >= 300}
                    self.gone |= set(range(300, 312))
                    self.is_restored = True
            elif method == "delete_collection":
                self.has_collection = False if is_done else None

    def check(self, root: Path) -> None:
        with CollectionSet(root) as collections:
            assert not collections.damaged
            if self.has_collection is None and not collections.names():
                return
            if self.has_collection is not False:
                assert collections.names() == ["pictures"]
                collection = collections.get("pictures")
                there = batches_in(collection)
                if not self.is_restoring:
                    assert self.certain <= there
                    if not self.is_restored:
                        assert not self.gone & there
                collection.upsert([])
            else:
                assert collections.names() == []
            assert len(collections.snapshots("pictures")) >= self.snapshots
            for each in collections.snapshots("pictures"):
                batches_in(collections.restore("pictures", each.name))


@pytest.mark.parametrize("kept", [0, 0.5, 0.97])
def test_what_was_acknowledged_survives_a_power_loss(
    traced: list[Entry], tmp_path: Path, kept: float
) -> None:
    chance = random.Random(f"power {kept}")
    for cut, disk in cuts(traced, chance, CUTS):
        folder = tmp_path / "left"
        folder.mkdir()
        disk.write_after_power_loss(folder, chance, kept=kept)
        promise = Promise(disk.acknowledged())
        try:
            promise.check(folder / "collections")
        except BaseException as error:
            error.add_note(f"the power was cut before entry {cut}, and {folder} was left")
            raise
        shutil.rmtree(folder)


def test_the_writer_did_all_that_it_should(traced: list[Entry]) -> None:
    disk = Disk()
    for entry in traced:
        disk.do(entry)
    lines = [json.loads(line) for line in disk.acknowledged()]
    assert sum(line[:2] == ["done", "upsert"] for line in lines) == 6 * 12
    assert lines[-1] == ["done", "delete_collection"]
    assert any(entry.kind == "r" and b".ann" in entry.data for entry in traced)  # indexes saved


def test_a_sync_that_is_left_out_is_noticed(traced: list[Entry], tmp_path: Path) -> None:
    """The model is no good if it forgives everything."""
    unsynced = [entry for entry in traced if entry.kind != "s"]
    chance = random.Random(0)
    for _, disk in cuts(unsynced, chance, 10):
        folder = tmp_path / "left"
        folder.mkdir()
        disk.write_after_power_loss(folder, chance, kept=0)
        promise = Promise(disk.acknowledged())
        if promise.certain:
            with pytest.raises((AssertionError, FileNotFoundError)):
                promise.check(folder / "collections")
            return
        shutil.rmtree(folder)
    raise AssertionError("nothing was acknowledged")
