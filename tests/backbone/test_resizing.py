"""The fast resizing, beside Pillow's."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.preprocess import Preprocess
from backbone.pretrained import load_model
from backbone.resizing import fastest, with_pillow, with_torch

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
SIZES = [(73, 97), (64, 64), (200, 31), (1, 1), (500, 300), (101, 90)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Blurred noise: all colours, and edges."""
    rng = np.random.default_rng(width + height)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    small = rng.integers(0, 256, (max(1, height // 3), max(1, width // 3), channels), np.uint8)
    made = Image.fromarray(small[..., 0] if channels == 1 else small)
    return made.resize((width, height), Image.Resampling.BILINEAR)


def assert_near(made: np.ndarray, pillows: np.ndarray) -> None:
    assert made.shape == pillows.shape
    assert made.dtype == pillows.dtype == np.uint8
    difference = made.astype(int) - pillows
    assert np.abs(difference).max() <= 3
    assert np.abs(difference).mean() <= 0.3


@pytest.mark.parametrize("size", SIZES)
def test_whole_pictures(size: tuple[int, int]) -> None:
    for width, height in ((333, 251), (90, 101), (7, 5), (1, 40)):
        source = picture(width, height)
        assert_near(with_torch(source, size, source.size), with_pillow(source, size, source.size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [(0.5, 0.5), (0.25, 1.0), (1.0, 0.125)])
def test_pictures_that_end_inside_of_their_last_pixels(
    size: tuple[int, int], share: tuple[float, float]
) -> None:
    source = picture(251, 188)
    extent = (250 + share[0], 187 + share[1])
    assert_near(with_torch(source, size, extent), with_pillow(source, size, extent))


def test_any_sizes() -> None:
    rng = np.random.default_rng(0)
    asked = 0
    for _ in range(400):
        source = picture(*(int(n) for n in rng.integers(1, 260, 2)))
        size = int(rng.integers(1, 300)), int(rng.integers(1, 300))
        if rng.random() < 0.3:  # one side as it is
            size = (source.width, size[1])
        cut = rng.choice([0.0, 0.125, 0.5, 0.875], 2)
        extent = source.width - cut[0], source.height - cut[1]
        made, pillows = with_torch(source, size, extent), with_pillow(source, size, extent)
        assert_near(made, pillows)
        asked += not np.array_equal(made, pillows)
    assert asked > 20  # or all were Pillow's


def test_a_part_that_keeps_one_side_is_pillows() -> None:
    source, extent = picture(221, 172), (220.125, 171.5)
    for size in ((221, 100), (100, 172), (220, 171)):
        made = with_torch(source, size, extent)
        assert np.array_equal(made, with_pillow(source, size, extent))


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_are_pillows(mode: str) -> None:
    source = picture(80, 60, mode)
    made = with_torch(source, (30, 20), source.size)
    assert np.array_equal(made, with_pillow(source, (30, 20), source.size))


def test_each_processor_has_one() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    assert fastest() is (with_torch if capability.startswith("AVX") else with_pillow)


def test_no_threads_are_started() -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    source, found = picture(1600, 1200), []

    def resize() -> None:
        with_torch(source, (800, 600), source.size)
        found.append(threads())

    torch.set_num_threads(1)  # as in the service
    before = threads()
    for _ in range(2):
        thread = threading.Thread(target=resize)
        thread.start()
        thread.join()
    assert max(found) <= before + 1


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="real pictures are not there")
def test_embeddings_of_photographs_stay_what_they_are() -> None:
    artifact = load_model("default").artifact
    network = artifact.network()
    views = {resize: [] for resize in (with_pillow, with_torch)}
    for path in sorted(PHOTOS.glob("*.jpg"))[::50]:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        for resize, found in views.items():
            found.append(artifact.preprocess.centre_crop(photo, resize=resize))
    pillows, torchs = (network(torch.stack(found)).cls.double() for found in views.values())
    cosines = torch.cosine_similarity(pillows, torchs)
    assert cosines.min() >= 0.999999
    assert not torch.equal(pillows, torchs)  # or the other was not asked


def test_views_take_it() -> None:
    preprocess, source = Preprocess(resize=36, crop=32, copy_size=40), picture(90, 70)
    views = [
        lambda resize: preprocess.centre_crop(source, resize=resize),
        lambda resize: preprocess.squash(source, multiple=8, resize=resize),
        lambda resize: preprocess.whole(source, short_side=48, multiple=8, resize=resize),
    ]
    for view in views:
        ours, pillows = view(with_torch), view(with_pillow)
        torch.testing.assert_close(ours, pillows, rtol=0, atol=0.04)
