import io
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from service import heatmaps
from service.errors import RequestError
from service.heatmaps import COLORMAPS, Colormap, Style, draw, draw_components
from tests.service.fakes import PATIENCE_S
from tests.service.pictures import RED, noise, plain

MAP = np.array([[0.0, 0.1], [0.2, 0.7]], dtype=np.float32)


def sheet(maps: np.ndarray, picture: Image.Image, **options: object) -> np.ndarray:
    style = {"colormap": "gray", "overlay": 1.0, "threshold": None, "size": max(picture.size)}
    content = draw(maps, picture, Style(**{**style, **options}))
    return np.asarray(Image.open(io.BytesIO(content)))


def test_the_strongest_patch_is_white_and_the_weakest_black() -> None:
    drawn = sheet(MAP[None], plain(RED, (64, 64)))
    assert drawn[-1, -1].tolist() == [255, 255, 255]
    assert drawn[0, 0].max() <= 8


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_colours_are_matplotlibs(colormap: Colormap) -> None:
    levels = np.linspace(0.0, 1.0, 1000, dtype=np.float32)

    drawn = sheet(levels[None, None], plain(RED, (1000, 1)), colormap=colormap)

    assert np.array_equal(drawn[0], matplotlib.colormaps[colormap](levels, bytes=True)[:, :3])


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.5, [[0, 0], [0, 1]]), (0.8, [[0, 0], [1, 1]]), (0.95, [[0, 1], [1, 1]])],
)
def test_the_mask_keeps_the_patches_that_hold_the_mass(
    threshold: float, kept: list[list[int]]
) -> None:
    # .7 alone holds half; .9 is needed for .8; and the lot but the empty patch for .95.
    drawn = sheet(MAP[None] + 1e-7, plain(RED, (64, 64)), colormap="jet", threshold=threshold)
    centres = drawn[16::32, 16::32]
    assert (centres.any(axis=2)).astype(int).tolist() == kept


def test_half_an_overlay_is_the_mean_of_both() -> None:
    picture = noise(1, (40, 20))
    alone, over = np.asarray(picture, dtype=float), sheet(MAP[None], picture).astype(float)
    mixed = sheet(MAP[None], picture, overlay=0.5)
    assert np.abs(mixed - (alone + over) / 2).max() <= 1.0


@pytest.mark.parametrize(
    ("heads", "size", "expected"),
    [
        (1, (30, 20), (30, 20)),
        (3, (30, 20), (98, 20)),
        (6, (30, 20), (98, 44)),
        (12, (20, 30), (92, 98)),
        (3, (60, 20), (60, 68)),  # wide pictures stand below each other
    ],
)
def test_heads_stand_in_a_grid(
    heads: int, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    drawn = sheet(np.repeat(MAP[None], heads, axis=0), plain(RED, size))
    assert drawn.shape[1::-1] == expected


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_slivers(size: tuple[int, int]) -> None:
    drawn = sheet(MAP[None], plain(RED, size), size=16)
    assert max(drawn.shape[:2]) == 16
    assert min(drawn.shape[:2]) == (16 if size == (1, 1) else 1)


def test_attention_of_nothing_is_no_division_by_zero() -> None:
    for threshold in (None, 0.6):
        drawn = sheet(np.zeros((1, 2, 2), dtype=np.float32), plain(RED), threshold=threshold)
        assert not drawn.any()


def test_labels_stand_in_the_corners() -> None:
    picture = plain(RED, (64, 64))
    maps = np.repeat(MAP[None], 4, axis=0)
    bare, labelled = sheet(maps, picture), labelled_sheet(maps, picture, ["0", "1", "10", "11"])
    differs = (bare != labelled).any(axis=2)
    for top, left in ((0, 0), (0, 68), (68, 0), (68, 68)):
        tile = differs[top : top + 64, left : left + 64]
        assert tile[:16, :16].any()
        assert not tile[20:].any()
        assert not tile[:, 24:].any()
    assert not np.array_equal(labelled[:64, :64], labelled[:64, 68:])


def labelled_sheet(maps: np.ndarray, picture: Image.Image, labels: list[str]) -> np.ndarray:
    style = Style(colormap="gray", overlay=1.0, threshold=None, size=max(picture.size))
    return np.asarray(Image.open(io.BytesIO(draw(maps, picture, style, labels=labels))))


def test_components_are_red_green_and_blue() -> None:
    maps = np.stack([MAP, MAP.T - 3.0, np.full_like(MAP, 7.0)])
    style = Style(colormap="gray", overlay=1.0, threshold=None, size=64)
    drawn = np.asarray(Image.open(io.BytesIO(draw_components(maps, plain(RED, (64, 64)), style))))
    assert drawn[-1, -1, :2].tolist() == [255, 255]
    assert drawn[-1, -1, 2] in (127, 128)  # half of 255
    assert drawn[0, 0, :2].max() <= 8


@pytest.mark.parametrize("size", [(60, 29), (200, 90)])
def test_a_grid_that_is_too_large_for_webp(size: tuple[int, int]) -> None:
    maps = np.repeat(MAP[None], 24, axis=0)  # wide pictures stand below each other
    style = Style(colormap="gray", overlay=1.0, threshold=None, size=1600, format="webp")
    with pytest.raises(RequestError, match="WebP has at most 16383") as caught:
        draw(maps, plain(RED, size), style)
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("rows", "columns", "width", "height"),
    [(7, 9, 500, 375), (60, 60, 20, 30), (1, 1, 5, 7), (1, 4, 100, 25)],
)
def test_maps_are_resized_as_pillow_does_it(
    rows: int, columns: int, width: int, height: int
) -> None:
    values = np.random.default_rng(0).uniform(-0.5, 1.5, (rows, columns)).astype(np.float32)
    expected = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    found = heatmaps._resize(values, width, height)
    assert found.shape == (height, width)
    assert np.allclose(found, np.asarray(expected).clip(0.0, 1.0), atol=1e-6)


_TEAMS = """
import os
import threading

import numpy as np
import torch
from PIL import Image

from service.heatmaps import Style, draw, draw_components
from service.torch_threads import torch_threads


def count():
    print(len(os.listdir("/proc/self/task")))


def work():
    torch.set_num_threads(2)
    with torch_threads(1):
        count()
    picture = Image.new("RGB", (1000, 800), "red")
    style = Style(colormap="viridis", overlay=0.5, threshold=None, size=1000)
    for heads in (1, 3):
        draw(np.ones((heads, 60, 70), np.float32), picture, style)
        count()
    draw_components(np.ones((3, 60, 70), np.float32), picture, style)
    count()
    torch.ones(1000, 1000).clamp_(0.0, 1.0)  # shows that a team would be seen
    count()


thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_a_thread_that_draws_wakes_no_team_of_torchs() -> None:
    """A second team would have the model's threads, which have one, sleep between products."""
    told = subprocess.run(
        [sys.executable, "-c", _TEAMS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    found = [int(line) for line in told.stdout.split()]
    assert found == [found[0]] * 4 + [found[0] + 1]
