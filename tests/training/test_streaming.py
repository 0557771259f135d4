import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.training.conftest import ROOT, write_pictures
from tests.training.test_data import CROPS, one, write_tar
from tests.training.test_sources import write_parquet
from training import shards as shards_module
from training.config import Data
from training.data import crop_loader, open_source, picture_count
from training.distributed import World
from training.plan import Plan
from training.samples import CropBatch, CropMaker
from training.shards import Shards, count_shards
from training.sources import DataError, find_shards
from training.streaming import StreamedBatches, buffered_order

# Three workers on a machine of two cores: slow, as torch warns, but as exact.
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")
pytestmark = MANY_WORKERS

COUNT = 43
CRUMBS = [9, 0, 1, 20, 13]  # pictures in each of five shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one.tar`, `one.tar.gz` and `five/`, each with the same 43 pictures in the same order."""
    root = tmp_path_factory.mktemp("streams")
    names = write_pictures(root / "pictures", COUNT)
    write_tar(root / "one.tar", root / "pictures", names)
    write_tar(root / "one.tar.gz", root / "pictures", names, "gz")
    (root / "five").mkdir()
    kinds = ["a.tar", "b.tar", "c.parquet", "d.tar.xz", "e.parquet"]
    rest = list(names)
    for kind, count in zip(kinds, CRUMBS, strict=True):
        own, rest = rest[:count], rest[count:]
        if kind.endswith("parquet"):
            content = [(root / "pictures" / name).read_bytes() for name in own]
            write_parquet(root / "five" / kind, list(content), paths=own)
        else:
            write_tar(root / "five" / kind, root / "pictures", own, kind.partition("tar")[2][1:])
    return root


def batches(
    source: Path,
    *,
    batch_size: int = 4,
    accumulation: int = 1,
    world: World | None = None,
    start: int = 0,
    stop: int,
    workers: int = 0,
    seed: int = 5,
    buffer: int = 6,
    stream: bool = True,
    known: Path | None = None,
) -> list[CropBatch]:
    world = world or one()
    data = Data(train=(str(source),), stream=stream, workers=workers, shuffle_buffer=buffer)
    opened = open_source(data, known or source.parent / "run", one())
    plan = Plan(
        count=picture_count(opened),
        batch_size=batch_size,
        accumulation=accumulation,
        world=world,
        seed=seed,
    )
    loader = crop_loader(
        opened, plan, data, CROPS, start=start, stop=stop, device=torch.device("cpu")
    )
    return list(loader)


def member_names(found: Sequence[CropBatch]) -> list[str]:
    return [name.rpartition("/")[2] for batch in found for name in batch.names]


def same(a: Sequence[CropBatch], b: Sequence[CropBatch]) -> bool:
    return len(a) == len(b) and all(
        x.names == y.names
        and x.bad == y.bad
        and torch.equal(x.global_crops, y.global_crops)
        and torch.equal(x.local_crops, y.local_crops)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("source", ["one.tar", "five"])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_has_each_picture_once(folder: Path, source: str, workers: int, size: int) -> None:
    steps = COUNT // (4 * size)
    runs = [
        batches(folder / source, world=one(rank, size), workers=workers, stop=2 * steps)
        for rank in range(size)
    ]
    assert [len(run) for run in runs] == [2 * steps] * size
    orders, left_out = [], []
    for epoch in range(2):
        seen = member_names(list(chain(*(r[epoch * steps : (epoch + 1) * steps] for r in runs))))
        assert len(seen) == len(set(seen)) == steps * 4 * size
        orders.append(seen)
        left_out.append({f"{i:03d}.png" for i in range(COUNT)} - set(seen))
    assert orders[0] != orders[1]
    assert left_out[0] != left_out[1]
    assert runs[0][0].global_crops.shape == (2, 4, 3, 16, 16)
    assert runs[0][0].local_crops.shape == (2, 4, 3, 8, 8)


@pytest.mark.parametrize("source", ["one.tar", "five"])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_a_start_in_the_middle_gives_the_rest(
    folder: Path, source: str, workers: int, size: int
) -> None:
    stop = 2 * (COUNT // (4 * size)) + 3
    for rank in range(size):
        world = one(rank, size)
        whole = batches(folder / source, world=world, workers=workers, stop=stop)
        for start in (1, 2, stop // 2, stop - 1) if workers == 0 else (4 + rank,):
            rest = batches(folder / source, world=world, workers=workers, start=start, stop=stop)
            assert same(rest, whole[start:]), (rank, start)


def test_accumulated_forwards(folder: Path) -> None:
    whole = batches(folder / "five", batch_size=2, accumulation=3, workers=2, stop=14)
    assert len(whole) == 14 * 3
    epoch = member_names(whole[: 7 * 3])  # 43 pictures hold seven steps of six
    assert len(epoch) == len(set(epoch)) == 42
    for start in (1, 8):
        args = {"batch_size": 2, "accumulation": 3, "workers": 2, "stop": 14}
        assert same(batches(folder / "five", start=start, **args), whole[3 * start :])


def test_one_worker_does_as_the_process_itself(folder: Path) -> None:
    alone = batches(folder / "five", stop=12)
    assert same(batches(folder / "five", stop=12), alone)
    assert same(batches(folder / "five", stop=12, workers=1), alone)


def test_compression_changes_nothing(folder: Path) -> None:
    plain = batches(folder / "one.tar", stop=12, workers=2)
    packed = batches(folder / "one.tar.gz", stop=12, workers=2)
    assert member_names(plain) == member_names(packed)
    assert all(
        torch.equal(a.global_crops, b.global_crops) for a, b in zip(plain, packed, strict=True)
    )


def test_seed_and_buffer_change_the_order(folder: Path) -> None:
    reference = member_names(batches(folder / "five", stop=10))
    assert member_names(batches(folder / "five", stop=10, seed=6)) != reference
    assert member_names(batches(folder / "five", stop=10, buffer=2)) != reference


def test_the_crops_are_those_of_reading_at_random(folder: Path) -> None:
    def crops(stream: bool) -> dict[str, torch.Tensor]:
        found = batches(folder / "five", stop=10, stream=stream)
        unbound = chain(*(batch.global_crops.unbind(1) for batch in found))
        return dict(zip(member_names(found), unbound, strict=True))

    streamed, random = crops(True), crops(False)
    common = streamed.keys() & random.keys()
    assert len(common) >= 37
    for name in common:
        assert torch.equal(streamed[name], random[name])


@pytest.mark.parametrize(("length", "buffer"), [(0, 4), (3, 8), (8, 8), (50, 1), (500, 20)])
def test_a_shuffle_buffer(length: int, buffer: int) -> None:
    order = buffered_order(length, buffer, np.random.default_rng(0))
    assert sorted(order) == list(range(length))
    assert all(position - turn < buffer for turn, position in enumerate(order))
    if buffer == 1:
        assert list(order) == list(range(length))
    if length == 500:
        assert np.abs(order - np.arange(length)).mean() > 5


def test_only_the_buffer_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped is not read, and what was given is let go."""
    read: list[str] = []

    def noting(path: Path):
        for name, content in shards_module.tars.read_through(path):
            yield name, lambda name=name, content=content: (read.append(name), content())[1]

    monkeypatch.setattr("training.streaming.read_shard", noting)
    shards = Shards([folder / "one.tar"], [COUNT])
    plan = Plan(count=COUNT, batch_size=4, world=one(), seed=5)
    stream = StreamedBatches(shards, CropMaker(CROPS), plan, start=6, stop=10, buffer=6, workers=0)
    given = 0
    for batch in stream:
        given += len(batch.names)
        assert len(read) <= given + 6
    assert given == 16
    assert Counter(read).most_common(1)[0][1] == 1
    assert len(read) == 16


def test_counts_are_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tmp_path / "run" / "shards.json"
    paths = find_shards([folder / "five"])
    assert count_shards(paths, known, one()).counts == CRUMBS
    counted: list[str] = []
    count = shards_module._count

    def noting(path: Path) -> int:
        counted.append(path.name)
        return count(path)

    monkeypatch.setattr(shards_module, "_count", noting)
    assert count_shards(paths, known, one()).count == COUNT
    assert counted == []
    os.utime(paths[3], (1, 1))  # changed since
    assert count_shards(paths, known, one()).counts == CRUMBS
    assert counted == ["d.tar.xz"]
    for damage in ("", "[1, 2]", json.dumps({"x": 1})[:-3]):
        known.write_text(damage)
        assert count_shards(paths, known, one()).counts == CRUMBS
    assert len(counted) == 1 + 3 * 5
    assert [path.name for path in known.parent.iterdir()] == ["shards.json"]


def count_with_others(rank: int, paths: list[Path], root: Path, found: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root / 'meet'}", rank=rank, world_size=2)
    try:
        found.put((rank, count_shards(paths, root / "run" / "shards.json", one(rank, 2)).counts))
    except DataError as error:
        found.put((rank, str(error)))


def test_processes_share_the_counting(folder: Path, tmp_path: Path) -> None:
    paths = find_shards([folder / "five"])
    fork = multiprocessing.get_context("fork")
    for turn, second in enumerate((paths, paths[1:])):
        found = fork.Queue()
        root = tmp_path / str(turn)
        root.mkdir()
        workers = [
            fork.Process(target=count_with_others, args=(rank, own, root, found))
            for rank, own in enumerate((paths, second))
        ]
        for worker in workers:
            worker.start()
        answers = dict(found.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join(60)
        if turn == 0:
            assert answers == {0: CRUMBS, 1: CRUMBS}
            remembered = json.loads((root / "run" / "shards.json").read_text())
            assert list(remembered.values()) == CRUMBS
        else:
            assert "do not see the same shards" in answers[0] == answers[1]


def test_shards_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    content = (folder / "one.tar").read_bytes()
    for name, cut in (("a.tar", content[: len(content) * 2 // 5]), ("b.tar", b"no tar" * 200)):
        path = tmp_path / name
        path.write_bytes(cut)
        with pytest.raises(DataError, match=name):
            batches(path, stop=1, known=tmp_path / "run")
    packed = (folder / "one.tar.gz").read_bytes()
    path = tmp_path / "c.tar.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"c\.tar\.gz"):
        batches(path, stop=1, known=tmp_path / "run")
    empty = write_tar(tmp_path / "empty.tar", folder, [])
    with pytest.raises(DataError, match=r"empty\.tar.*no picture"):
        batches(empty, stop=1, known=tmp_path / "run")
    plan = Plan(count=50, batch_size=50, world=one(), seed=0)
    shards = Shards([folder / "one.tar"], [50])
    maker = CropMaker(CROPS)
    stream = StreamedBatches(shards, maker, plan, start=0, stop=1, buffer=4, workers=0)
    with pytest.raises(DataError, match=r"one\.tar.*fewer than the 50"):
        list(stream)


def test_real_shards(tmp_path: Path) -> None:
    path = ROOT.parent / "shared" / "data" / "tiny-imagenet-val.tar.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {path.parent}")
    args = {"batch_size": 64, "workers": 2, "buffer": 500, "known": tmp_path}
    first = batches(path, stop=3, **args)
    assert len(set(chain(*(batch.names for batch in first)))) == 192
    assert same(batches(path, start=1, stop=3, **args), first[1:])
