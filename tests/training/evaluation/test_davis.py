"""DAVIS's layout, its masks and their palette."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.evaluation.videos import SIZE, true_mask, write_davis
from training.evaluation.davis import (
    count_objects,
    open_davis,
    palette,
    read_mask,
    write_mask,
)
from training.sources import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_davis(tmp_path / "DAVIS", "bear", "camel", frames=3)


def test_sequences_in_the_order_of_the_list(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").write_text("camel\n\n bear\n")
    camel, bear = open_davis(root)
    assert (camel.name, bear.name) == ("camel", "bear")
    assert [path.name for path in bear.frames] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert [path.name for path in bear.annotations] == ["00000.png", "00001.png", "00002.png"]
    assert bear.size == SIZE
    assert count_objects(bear) == 1


def test_masks_come_back_as_written_in_the_palette_of_davis(tmp_path: Path) -> None:
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    write_mask(tmp_path / "mask.png", mask)
    assert np.array_equal(read_mask(tmp_path / "mask.png", size=(4, 3)), mask)
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P"
        assert bytes(picture.getpalette() or ()) == palette()[: 3 * 256]


def test_palette_is_that_of_pascal_voc() -> None:
    colours = [tuple(palette()[3 * i : 3 * i + 3]) for i in range(256)]
    assert colours[:9] == [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128),
        (0, 128, 128), (128, 128, 128), (64, 0, 0),
    ]  # fmt: skip
    assert colours[21:23] == [(128, 64, 128), (0, 192, 128)]
    assert colours[255] == (224, 224, 192)
    assert len(set(colours)) == 256


def test_void_is_background(tmp_path: Path) -> None:
    mask = true_mask(0)
    mask[0, :10] = 255
    write_mask(tmp_path / "mask.png", mask)
    assert np.array_equal(read_mask(tmp_path / "mask.png", size=SIZE), true_mask(0))


def no_list(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").unlink()


def empty_list(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").write_text("\n")


def list_with_a_path(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").write_text("bear\n../camel\n")


def list_with_a_name_twice(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").write_text("bear\nbear\n")


def list_with_an_unknown_name(root: Path) -> None:
    (root / "ImageSets/2017/val.txt").write_text("cat\n")


def two_frames(root: Path) -> None:
    (root / "JPEGImages/480p/camel/00002.jpg").unlink()


def no_frames(root: Path) -> None:
    for path in (root / "JPEGImages/480p/camel").iterdir():
        path.unlink()


def missing_mask(root: Path) -> None:
    (root / "Annotations/480p/camel/00001.png").unlink()


def mask_without_frame(root: Path) -> None:
    write_mask(root / "Annotations/480p/camel/00003.png", true_mask(3))


def mask_of_another_size(root: Path) -> None:
    write_mask(root / "Annotations/480p/camel/00001.png", true_mask(1)[:-1])


def frame_of_another_size(root: Path) -> None:
    Image.new("RGB", (20, 10)).save(root / "JPEGImages/480p/camel/00002.jpg")


def broken_frame(root: Path) -> None:
    (root / "JPEGImages/480p/camel/00002.jpg").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_list, r"DAVIS' has no ImageSets/2017/val\.txt; expected DAVIS 2017's layout"),
        (empty_list, r"val\.txt' lists no sequence"),
        (list_with_a_path, r"lists '\.\./camel': each line must be the name of one folder"),
        (list_with_a_name_twice, r"lists 'bear': .* stand there once"),
        (list_with_an_unknown_name, r"480p/cat' is no folder"),
        (two_frames, r"480p/camel' holds 2 frames .* at least 3"),
        (no_frames, r"480p/camel' holds 0 frames"),
        (missing_mask, r"camel/00001\.png' is missing: 00001\.jpg, as each frame"),
        (mask_without_frame, r"camel/00003\.png' has no frame in"),
        (mask_of_another_size, r"camel/00001\.png' is 128 x 95 pixels; expected 128 x 96"),
        (frame_of_another_size, r"camel/00002\.jpg' is 20 x 10 pixels; expected 128 x 96"),
        (broken_frame, r"camel/00002\.jpg' cannot be read"),
    ],
)
def test_what_is_not_davis_is_refused(
    root: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_davis(root)


def test_masks_that_are_none(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.new("RGB", SIZE).save(path)
    with pytest.raises(DataError, match=r"mask\.png' has mode RGB; expected a palette"):
        read_mask(path, size=SIZE)
    write_mask(path, true_mask(0))
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(DataError, match=r"mask\.png' cannot be read"):
        read_mask(path, size=SIZE)
    with pytest.raises(DataError, match=r"none\.png' does not exist"):
        read_mask(tmp_path / "none.png", size=SIZE)


def test_a_first_mask_without_objects(root: Path) -> None:
    write_mask(root / "Annotations/480p/bear/00000.png", np.full(SIZE[::-1], 255, np.uint8))
    with pytest.raises(DataError, match=r"bear/00000\.png' marks no object"):
        count_objects(open_davis(root)[0])


def test_hidden_files_are_no_frames(tmp_path: Path) -> None:
    root = write_davis(tmp_path, "square")
    (root / "JPEGImages/480p/square/._00000.jpg").touch()
    (root / "Annotations/480p/square/._00000.png").touch()
    assert len(open_davis(root)[0].frames) == 6
