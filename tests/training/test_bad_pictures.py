import csv
import os
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from tests.training.conftest import write_pictures
from tests.training.test_data import CROPS, one, write_tar
from tests.training.test_streaming import MANY_WORKERS, batches, same
from training.bad_pictures import BadPictures
from training.data import PictureDataset, one_line
from training.samples import Bad, CropBatch, CropMaker, first_good
from training.sources import DataError, open_pictures

pytestmark = MANY_WORKERS

REASONS = {
    "cut.jpg": "truncated",
    "empty.jpg": "not a picture of a known format",
    "text.jpg": "not a picture of a known format",
}


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Thirteen good pictures and three bad ones."""
    folder = tmp_path / "album"
    names = write_pictures(folder, 14, suffix=".jpg")
    whole = (folder / names[0]).read_bytes()
    (folder / names[0]).unlink()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("These are not the pixels you are looking for.\n")
    return folder


def places(found: Sequence[CropBatch]) -> int:
    return sum(len(batch.names) for batch in found)


def bad_names(found: Sequence[CropBatch]) -> set[str]:
    return {name.rpartition("/")[2] for batch in found for name, _ in batch.bad}


@pytest.mark.parametrize("workers", [0, 3])
def test_others_take_the_places_of_bad_pictures(album: Path, workers: int) -> None:
    run = batches(album, stream=False, stop=8, workers=workers)
    assert places(run) == 32
    assert bad_names(run) == set(REASONS)
    for batch in run:
        assert batch.global_crops.shape == (2, 4, 3, 16, 16)
        assert not set(batch.names) & set(REASONS)
        for name, reason in batch.bad:
            assert REASONS[name] in reason.lower()
    assert same(run, batches(album, stream=False, stop=8))
    assert same(run[3:], batches(album, stream=False, start=3, stop=8, workers=2))


def test_the_rest_is_as_without_bad_pictures(album: Path, tmp_path: Path) -> None:
    pictures = open_pictures([album])
    dataset = PictureDataset(pictures, CropMaker(CROPS), seed=0)
    content = (album / "001.jpg").read_bytes()
    good = pictures.names.index("005.jpg")
    before = dataset[0, good]
    assert (before.name, before.bad) == ("005.jpg", ())
    bad = pictures.names.index("text.jpg")
    substitute = dataset[0, bad]
    assert substitute.name not in REASONS
    assert "text.jpg" in dict(substitute.bad)
    own = dataset[0, pictures.names.index(substitute.name)]
    assert not torch.equal(own.made[0], substitute.made[0])  # other crops than at its own place
    (album / "text.jpg").write_bytes(content)
    assert dataset[0, bad].bad == ()
    assert torch.equal(dataset[0, good].made[0], before.made[0])


def test_a_file_that_went_is_bad(album: Path) -> None:
    pictures = open_pictures([album])
    (album / "003.jpg").unlink()
    sample = PictureDataset(pictures, CropMaker(CROPS), seed=0)[0, pictures.names.index("003.jpg")]
    assert sample.bad[0][0] == "003.jpg"
    assert "No such file" in sample.bad[0][1]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_with_bad_pictures(album: Path, tmp_path: Path, workers: int) -> None:
    names = sorted(path.name for path in album.iterdir())
    tar = write_tar(tmp_path / "album.tar", album, names)
    run = batches(tar, stop=12, workers=workers)
    assert places(run) == 48
    assert bad_names(run) == set(REASONS)
    for start in (1, 6):
        assert same(run[start:], batches(tar, start=start, stop=12, workers=workers))
    for epoch in range(3):
        good = [n for batch in run[4 * epoch : 4 * epoch + 4] for n in batch.names]
        assert len(set(good)) == 13  # every good one, and three of them twice
        assert len(good) == 16


def test_sixteen_in_a_row(tmp_path: Path) -> None:
    tried = []

    def read() -> bytes:
        tried.append(1)
        return b""

    with pytest.raises(DataError, match=r"16 pictures in a row.*x: not a picture"):
        first_good((("x", read) for _ in range(100)), CropMaker(CROPS), "key")
    assert len(tried) == 16
    for i in range(40):
        (tmp_path / f"{i:02d}.jpg").write_text("no picture")
    tar = write_tar(tmp_path / "a.tar", tmp_path, [f"{i:02d}.jpg" for i in range(40)])
    for workers in (0, 1):
        assert refusal(tmp_path, stream=False, workers=workers).startswith("16 pictures in a row")
        assert refusal(tar, stream=True, workers=workers).startswith("16 pictures in a row")


def refusal(source: Path, *, stream: bool, workers: int) -> str:
    try:
        batches(source, stream=stream, stop=1, workers=workers)
    except DataError as error:
        error.__traceback__ = None  # it would keep the workers waiting until garbage is collected
        return one_line(error)
    pytest.fail("it ran")


class Seen(NamedTuple):
    names: list[str]
    bad: Bad


def seen(good: int, *bad: str) -> Seen:
    return Seen(["x"] * good, tuple((name, "torn\nin two") for name in bad))


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_the_list_in_the_run_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    bad = BadPictures(run_dir, one(1, 2))
    bad.saw(seen(8))
    assert not run_dir.exists()
    odd = os.fsdecode(b'caf\xe9, "x".jpg')
    bad.saw(seen(8, "b.jpg", odd))
    bad.saw(seen(8, "b.jpg", "a.jpg", "a.jpg"))
    assert bad.count == 3
    path = run_dir / "bad_pictures.rank1.csv"
    expected = [["name", "reason"], *([name, "torn in two"] for name in ("b.jpg", odd, "a.jpg"))]
    assert rows(path) == expected

    with path.open("ab") as file:
        file.write(b"half a r")  # as a killed run leaves it
    resumed = BadPictures(run_dir, one(1, 2))
    assert resumed.count == 3
    resumed.saw(seen(8, "a.jpg", odd))
    resumed.saw(seen(8, "c.jpg"))
    assert rows(path) == [*expected, ["c.jpg", "torn in two"]]
    assert BadPictures(run_dir, one(0, 2)).count == 0


def test_mostly_bad_pictures_stop_a_run(tmp_path: Path) -> None:
    bad = BadPictures(tmp_path, one())
    names = iter(range(10_000))

    def half(good: int, of: int) -> None:
        bad.saw(seen(good, *(f"{next(names)}.jpg" for _ in range(of))))

    for _ in range(9):
        half(5, 5)  # 90 pictures: too few to tell
    with pytest.raises(DataError) as caught:
        half(5, 5)
    said = str(caught.value)
    assert "50 of the latest 100 pictures" in said
    assert "49.jpg" in said
    assert str(tmp_path / "bad_pictures.rank0.csv") in said

    bad = BadPictures(tmp_path, one())
    for _ in range(50):
        half(6, 4)
    for _ in range(4):
        half(4, 6)  # 48 of the latest 100
    with pytest.raises(DataError, match=r"50 of the latest 100 pictures"):
        half(4, 6)


def test_a_mostly_bad_folder_stops(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_pictures(folder, 40)
    for i in range(80):
        (folder / f"bad{i:02d}.jpg").write_bytes(random.Random(i).randbytes(100))
    bad = BadPictures(tmp_path / "run", one())
    run = iter(batches(folder, stream=False, batch_size=8, stop=30))
    with pytest.raises(DataError, match=r"cannot be read, among them bad\d\d\.jpg"):
        deque(map(bad.saw, run), maxlen=0)
    assert len(list(run)) > 10
    assert bad.count >= 30
    assert len(rows(bad.path)) == bad.count + 1


def test_a_batch_can_be_pinned(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pinning does to the parts that are no tensors, with the pinning itself left out."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    run = batches(album, stream=False, batch_size=16, stop=1)
    pinned = pin_memory(run[0])
    assert isinstance(pinned, CropBatch)
    assert torch.equal(pinned.local_crops, run[0].local_crops)
    assert pinned.names == run[0].names
    bad = BadPictures(album.parent / "run", one())
    bad.saw(pinned)
    assert [row[0] for row in rows(bad.path)[1:]] == list(dict(run[0].bad))
