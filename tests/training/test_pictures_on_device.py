import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.conftest import ROOT, picture, write_pictures
from training.augmentations import draw_views, multi_crop
from training.config import Crops
from training.decoding import decode, to_array
from training.device_augmentations import augment, view_table
from training.pictures_on_device import PicturesOnDevice
from training.sources import DataError, Pictures, every, open_pictures

CPU = torch.device("cpu")
CROPS = Crops(global_size=16, local_count=2, local_size=8)


def held(pictures: Pictures, workers: int = 0, **options: int) -> PicturesOnDevice:
    return PicturesOnDevice(pictures, device=CPU, workers=workers, progress=False, **options)


def check(found: PicturesOnDevice, folder: Path, indices: list[int]) -> None:
    canvas, sizes = found.batch(indices)
    for values, (height, width), i in zip(canvas, sizes.tolist(), indices, strict=True):
        content = (folder / found.names[i]).read_bytes()
        expected = to_array(decode(content, found.names[i]))
        assert expected.shape == (3, height, width)
        assert np.array_equal(values[:, :height, :width].numpy(), expected)
        assert not values[:, height:].any()
        assert not values[:, :, width:].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_different_sizes(tmp_path: Path, workers: int) -> None:
    for i in range(40):
        picture(i, (5 + i, 45 - i)).save(tmp_path / f"{i:02d}.png")
    found = held(open_pictures([tmp_path]), workers)
    assert len(found) == 40
    assert found.bytes == sum(3 * (5 + i) * (45 - i) for i in range(40))
    assert found.bad == []
    check(found, tmp_path, [3, 39, 0, 3])
    check(found, tmp_path, [17])


def test_pictures_of_one_size_are_gathered_in_one_go(tmp_path: Path) -> None:
    write_pictures(tmp_path, 9)
    found = held(open_pictures([tmp_path]))
    check(found, tmp_path, [8, 0, 4, 4])
    canvas, sizes = found.batch([8, 0])
    assert canvas.shape == (2, 3, 20, 24)
    assert sizes.tolist() == [[20, 24]] * 2


def test_pictures_of_as_many_pixels_but_other_sides(tmp_path: Path) -> None:
    for i in range(4):
        picture(i, (24, 20) if i % 2 else (20, 24)).save(tmp_path / f"{i}.png")
    check(held(open_pictures([tmp_path])), tmp_path, [0, 1, 2, 3])


@pytest.mark.parametrize("alike", [True, False])
def test_bad_pictures_are_left_out_and_told(tmp_path: Path, alike: bool) -> None:
    names = write_pictures(tmp_path, 20)
    (tmp_path / names[3]).write_bytes(b"")  # bad from its header on
    cut = tmp_path / names[7]
    cut.write_bytes(cut.read_bytes()[:-100])  # the header is well
    if not alike:
        picture(0, (31, 7)).save(tmp_path / names[12])
    found = held(open_pictures([tmp_path]))
    assert [name for name, _ in found.bad] == [names[3], names[7]]
    assert all(name in reason for name, reason in found.bad)
    assert found.names == [name for name in names if name not in (names[3], names[7])]
    check(found, tmp_path, list(range(18)))


def test_no_picture_that_can_be_read(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 2)
    for name in names:
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"none of 2 pictures .*000\.png"):
        held(open_pictures([tmp_path]))


def test_more_than_the_memory_that_is_free(tmp_path: Path) -> None:
    write_pictures(tmp_path, 10)
    needed = 10 * 3 * 20 * 24
    held(open_pictures([tmp_path]), free_bytes=needed * 2)
    with pytest.raises(DataError, match=r"data\.on_device.* 10 pictures .*80% .* free on cpu"):
        held(open_pictures([tmp_path]), free_bytes=needed)


def test_other_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 12, 10, 5), dtype=np.uint8)
    for i, array in enumerate(values):
        np.save(tmp_path / f"{i}.npy", array)
    found = held(open_pictures([tmp_path]), channels=5)
    canvas, _ = found.batch([2, 0])
    assert np.array_equal(canvas.numpy(), values[[2, 0]].transpose(0, 3, 1, 2))


def test_from_the_device_to_crops(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 6)
    found = held(open_pictures([tmp_path]))
    indices = [5, 1, 2]
    canvas, sizes = found.batch(indices)
    rngs = [random.Random(i) for i in indices]
    tables = [
        view_table(draw_views(width, height, CROPS, rng))
        for (height, width), rng in zip(sizes.tolist(), rngs, strict=True)
    ]
    crops = augment(canvas, sizes, torch.stack(tables), CROPS)
    for at, i in enumerate(indices):
        source = decode((tmp_path / names[i]).read_bytes(), names[i])
        expected = multi_crop(source, CROPS, random.Random(i))
        for ours, theirs in zip(crops, expected, strict=True):
            assert np.abs(ours[:, at].numpy().astype(np.int16) - theirs).mean() < 0.5


def test_real_pictures_in_a_compressed_tar() -> None:
    path = ROOT.parent / "shared" / "data" / "tiny-imagenet-val.tar.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {path.parent}")
    pictures = every(open_pictures([path]), 300)
    found = held(pictures, workers=2)
    assert len(found) == 300
    assert found.bytes == 300 * 3 * 64 * 64
    canvas, _ = found.batch([299, 17])
    expected = to_array(decode(pictures.read(299), "x"))
    assert np.array_equal(canvas[0].numpy(), expected)
