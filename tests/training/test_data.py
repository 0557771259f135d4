import gc
import gzip
import io
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import ROOT, finish, picture, write_pictures
from training.config import Crops, Data
from training.data import PictureDataset, RunSampler, crop_loader
from training.decoding import decode
from training.distributed import World
from training.plan import Plan
from training.samples import CropBatch, CropMaker
from training.sources import DataError, FolderPictures, class_labels, open_pictures

CROPS = Crops(global_size=16, local_count=2, local_size=8)
COMPRESSIONS = {"": "plain", "gz": "gzip", "bz2": "bzip2", "xz": "xz"}


def one(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, torch.device("cpu"))


def write_tar(path: Path, folder: Path, names: Sequence[str], compression: str = "") -> Path:
    with tarfile.open(path, f"w:{compression}") as tar:
        for name in names:
            tar.add(folder / name, arcname=name)
    return path


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that temporary files go to in this test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        ["a.png", "b.png", "c.png"],
        ["cat/1.png", "cat/2.png", "dog/1.png"],
        ["2024/may/trip/x.png", "2024/y.png", "z.png"],
    ],
    ids=["flat", "classes", "nested"],
)
def test_folders_of_every_layout(tmp_path: Path, layout: list[str]) -> None:
    for i, name in enumerate(layout):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / name)
    pictures = open_pictures([tmp_path])
    assert sorted(pictures.names) == sorted(layout)
    for i, name in enumerate(pictures.names):
        assert pictures.read(i) == (tmp_path / name).read_bytes()


def test_the_order_of_a_folder_is_that_of_its_paths(tmp_path: Path) -> None:
    for name in ("b/1.png", "a/2.png", "a/1.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / name)
    assert FolderPictures(tmp_path).names == ["a/1.png", "a/2.png", "b/1.png", "c.png"]


def test_what_is_no_picture_is_ignored(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    picture(1).save(tmp_path / "UPPER.JPG")
    for name in ("notes.txt", ".hidden.png", "._000.png", "README", "labels.csv"):
        (tmp_path / name).write_bytes(b"not a picture")
    (tmp_path / ".cache").mkdir()
    picture(2).save(tmp_path / ".cache" / "thumbnail.png")
    (tmp_path / "folder.png").mkdir()
    assert open_pictures([tmp_path]).names == ["000.png", "UPPER.JPG"]

    tar = tmp_path / "all.tar"
    with tarfile.open(tar, "w") as file:
        file.add(tmp_path, arcname=".", filter=lambda m: None if m.name.endswith(".tar") else m)
    assert sorted(Path(n).name for n in open_pictures([tar]).names) == ["000.png", "UPPER.JPG"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_tar_gives_its_pictures_in_order(tmp_path: Path, scratch: Path, compression: str) -> None:
    folder = tmp_path / "pictures"
    names = write_pictures(folder / "class", 5)
    order = [f"class/{names[i]}" for i in (3, 0, 4, 1, 2)]
    tar = write_tar(tmp_path / "data.tar", folder, order, compression)
    pictures = open_pictures([str(tar)])
    assert pictures.names == order
    for i in (4, 0, 2, 1, 3):
        assert pictures.read(i) == (folder / order[i]).read_bytes()
    assert not list(scratch.iterdir())  # what was unpacked has no name


def test_an_unpacked_tar_goes_when_the_process_is_killed(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures", 2)
    tar = write_tar(tmp_path / "data.tar.gz", tmp_path / "pictures", names, "gz")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = (
        "import os, signal, tempfile; from training.sources import open_pictures\n"
        f"tempfile.tempdir = {str(scratch)!r}\n"
        f"pictures = open_pictures([{str(tar)!r}])\n"
        "print(len(pictures.read(1)), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    status, out, err = finish([sys.executable, "-c", code])
    size = (tmp_path / "pictures" / names[1]).stat().st_size
    assert (status, out.split()) == (-9, [str(size)]), err
    assert not list(scratch.iterdir())


def test_several_sources_are_joined(tmp_path: Path, scratch: Path) -> None:
    first = write_pictures(tmp_path / "first", 3)
    second = write_pictures(tmp_path / "second", 2, suffix=".jpg")
    tar = write_tar(tmp_path / "second.tgz", tmp_path / "second", second, "gz")
    pictures = open_pictures([tmp_path / "first", tar, tmp_path / "second"])
    assert pictures.names == [*first, *second, *second]
    expected = [(tmp_path / "first" / n).read_bytes() for n in first]
    expected += 2 * [(tmp_path / "second" / n).read_bytes() for n in second]
    assert [pictures.read(i) for i in range(7)] == expected


@pytest.mark.parametrize("compression", ["", "gz"])
def test_workers_give_the_batches_of_one_process(tmp_path: Path, compression: str) -> None:
    names = write_pictures(tmp_path / "pictures", 8)
    tar = write_tar(tmp_path / "data.tar", tmp_path / "pictures", names, compression)
    pictures = open_pictures([tar])
    pictures.read(0)  # a file that is open already when the workers start

    def batches(workers: int) -> list[CropBatch]:
        return list(
            crop_loader(
                pictures,
                Plan(count=8, batch_size=2, world=one(), seed=1),
                Data(train=("x",), workers=workers),
                CROPS,
                start=0,
                stop=8,
                device=torch.device("cpu"),
            )
        )

    alone, together = batches(0), batches(2)
    assert [b[0].shape for b in alone] == [(2, 2, 3, 16, 16)] * 8
    assert alone[0][1].shape == (2, 2, 3, 8, 8)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.local_crops, b.local_crops)
        assert (a.names, a.bad) == (b.names, b.bad)
    assert sorted(chain(*(batch.names for batch in alone[:4]))) == names
    assert pictures.read(7) == (tmp_path / "pictures" / names[7]).read_bytes()


def message(*paths: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_pictures(paths)
    return str(caught.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in message(tmp_path / "nowhere")


def test_a_source_without_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "full", 1)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.txt").write_text("nothing to see")
    assert str(tmp_path / "bare") in message(tmp_path / "full", tmp_path / "bare")
    tar = write_tar(tmp_path / "bare.tar", tmp_path / "bare", ["notes.txt"])
    assert str(tar) in message(tar)


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "notes.tar"
    path.write_text("no tar file at all" * 100)
    assert "neither a folder nor a whole tar file" in message(path)
    assert str(path) in message(path)
    path.write_bytes(b"")
    assert str(path) in message(path)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_tar_that_was_cut_short(tmp_path: Path, scratch: Path, compression: str) -> None:
    names = write_pictures(tmp_path / "pictures", 6)
    tar = write_tar(tmp_path / "data.tar", tmp_path / "pictures", names, compression)
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) * 2 // 5])
    said = message(tar)
    assert str(tar) in said
    assert ("cannot be unpacked" if compression else "nor a whole tar file") in said
    gc.collect()
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_data_that_was_altered(tmp_path: Path, scratch: Path, compression: str) -> None:
    names = write_pictures(tmp_path / "pictures", 6)
    tar = write_tar(tmp_path / "data.tar", tmp_path / "pictures", names, compression)
    content = bytearray(tar.read_bytes())
    at = {"gz": -8, "bz2": -8, "xz": -24}[compression]  # in the checksums
    content[at : at + 4] = bytes(4)
    tar.write_bytes(content)
    assert "cannot be unpacked" in message(tar)


def test_a_compressed_file_of_a_tar_cut_short(tmp_path: Path, scratch: Path) -> None:
    names = write_pictures(tmp_path / "pictures", 6)
    tar = write_tar(tmp_path / "data.tar", tmp_path / "pictures", names)
    path = tmp_path / "data.tar.gz"
    path.write_bytes(gzip.compress(tar.read_bytes()[:3000]))
    assert str(path) in message(path)


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    picture(5, (40, 30)).save(buffer, form)
    return buffer.getvalue()


FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_decoded_to_rgb(form: str) -> None:
    decoded = decode(encoded(form), "x")
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))
    difference = np.asarray(decoded, np.int16) - np.asarray(picture(5, (40, 30)), np.int16)
    assert np.abs(difference).mean() < (0.5 if form in {"BMP", "PNG", "PPM", "TIFF"} else 12)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    if mode == "I;16":
        source = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    else:
        source = Image.new("RGB", (8, 8), (128, 128, 128))
        source = source.quantize(4) if mode == "P" else source.convert(mode)
    source.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    decoded = decode(buffer.getvalue(), "x")
    assert decoded.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(decoded, np.int16) - 128).max() <= 3


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    buffer = io.BytesIO()
    source = picture(0).quantize(8)
    source.save(buffer, "PNG", transparency=bytes([0, 128, 255]))
    assert decode(buffer.getvalue(), "x").mode == "RGB"


@pytest.mark.parametrize("form", FORMATS)
def test_a_broken_picture_is_named_whatever_is_wrong_with_it(form: str) -> None:
    content = encoded(form)
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(150):
        broken = bytearray(content)
        if i % 2:
            broken = broken[: rng.integers(len(broken))]
        else:
            at = rng.integers(0, min(len(broken), 200), 3)
            for place in at:
                broken[place] = rng.integers(256)
        said = refusal(bytes(broken))
        if said is not None:
            assert "'album/broken'" in said
            refused += 1
    assert refused > 20


def refusal(content: bytes) -> str | None:
    """What `decode` says of broken bytes; None where it can read them nevertheless."""
    try:
        decode(content, "album/broken")
    except DataError as error:
        return str(error)
    return None


def test_class_labels(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "train/cat/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / name)
    assert class_labels(open_pictures([tmp_path]), where="x") == ["cat", "cat", "dog"]
    picture(0).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png.*--val"):
        class_labels(open_pictures([tmp_path]), where="--val")


def batches(count: int, batch_size: int, world: World, start: int, stop: int, seed: int = 0):
    plan = Plan(count=count, batch_size=batch_size, world=world, seed=seed)
    sampler = RunSampler(plan, start=start, stop=stop)
    found = list(sampler)
    assert len(found) == len(sampler) == stop - start
    return found


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    run = batches(23, 5, one(), 0, 12)
    epochs = [list(chain(*run[4 * e : 4 * e + 4])) for e in range(3)]
    for e, epoch in enumerate(epochs):
        assert {number for number, _ in epoch} == {e}
        indices = [i for _, i in epoch]
        assert len(set(indices)) == 20  # without repeats; three are left over
        assert set(indices) <= set(range(23))
    orders = [[i for _, i in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert batches(23, 5, one(), 0, 12) == run
    assert batches(23, 5, one(), 0, 12, seed=1) != run


def test_all_pictures_are_seen_where_the_batch_divides() -> None:
    run = batches(12, 4, one(), 0, 3)
    assert sorted(i for _, i in chain(*run)) == list(range(12))


def test_two_ranks_see_what_one_sees() -> None:
    whole = batches(30, 6, one(), 0, 10)
    parts = [batches(30, 3, one(rank, 2), 0, 10) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("start", [1, 4, 5, 11])
def test_a_start_in_the_middle_gives_the_rest(start: int) -> None:
    assert batches(22, 4, one(), start, 12) == batches(22, 4, one(), 0, 12)[start:]


def test_too_few_pictures_for_a_batch() -> None:
    assert Plan(count=8, batch_size=4, world=one(0, 2), seed=0).steps_per_epoch == 1
    with pytest.raises(DataError, match=r"7 pictures .* batch of 8 .*4 x 2"):
        Plan(count=7, batch_size=4, world=one(0, 2), seed=0)
    with pytest.raises(DataError, match=r"7 pictures .* batch of 8 .*2 x 2 forwards x 2"):
        Plan(count=7, batch_size=2, accumulation=2, world=one(0, 2), seed=0)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_forwards_see_what_one_sees(size: int) -> None:
    def seen(rank: int, batch_size: int, accumulation: int) -> list[list[tuple[int, int]]]:
        plan = Plan(
            count=26,
            batch_size=batch_size,
            accumulation=accumulation,
            world=one(rank, size),
            seed=0,
        )
        sampler = RunSampler(plan, start=1, stop=6)
        found = list(chain(*sampler))
        steps = [found[i : i + 6] for i in range(0, len(found), 6)]
        assert (len(sampler), len(steps)) == (5 * accumulation, 5)
        return steps

    for rank in range(size):
        assert seen(rank, 2, 3) == seen(rank, 3, 2) == seen(rank, 6, 1)


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    pictures = open_pictures([tmp_path])

    def crops(seed: int, epoch: int, i: int) -> torch.Tensor:
        return PictureDataset(pictures, CropMaker(CROPS), seed=seed)[epoch, i].made[0]

    reference = crops(0, 0, 0)
    assert reference.dtype == torch.uint8
    again = PictureDataset(pictures, CropMaker(CROPS), seed=0)
    again[5, 2], again[1, 1]
    assert torch.equal(again[0, 0].made[0], reference)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(crops(*other), reference)


def test_real_pictures() -> None:
    path = ROOT.parent / "shared" / "data" / "tiny-imagenet-val.tar.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {path.parent}")
    pictures = open_pictures([path])
    assert len(pictures.names) == 5000
    assert len(set(class_labels(pictures, where="val"))) == 200
    for i in (0, 2500, 4999):
        assert decode(pictures.read(i), pictures.names[i]).size == (64, 64)
