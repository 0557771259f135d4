import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from backbone.pictures import Mode, over_white, to_mode, to_rgb
from backbone.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

SMALL = Preprocess(resize=36, crop=32, copy_size=40)


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(size)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    made = Image.fromarray(pixels)
    return made.quantize(16) if mode == "P" else made.convert(mode)


def torchvisions(preprocess: Preprocess, source: Image.Image) -> Tensor:
    """The evaluation's view as the original's scripts write it."""
    bicubic = InterpolationMode.BICUBIC
    steps = [
        v2.Resize(preprocess.resize, interpolation=bicubic, antialias=True),
        v2.CenterCrop(preprocess.crop),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocess.mean, preprocess.std),
    ]
    view: Tensor = v2.Compose(steps)(source)
    return view


@pytest.mark.parametrize(
    "size",
    [(48, 36), (36, 48), (37, 53), (101, 67), (36, 36), (32, 32), (20, 31), (640, 97), (35, 200)],
)
@pytest.mark.parametrize("crop", [32, 31, 36])
def test_the_centre_crop_is_torchvisions(size: tuple[int, int], crop: int) -> None:
    preprocess = Preprocess(resize=36, crop=crop, copy_size=40)
    ours = preprocess.centre_crop(picture(size))
    assert ours.shape == (3, crop, crop)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, torchvisions(preprocess, picture(size)), rtol=0, atol=1e-5)


def test_the_papers_sizes() -> None:
    preprocess = Preprocess()
    assert (preprocess.mean, preprocess.std) == (IMAGENET_MEAN, IMAGENET_STD)
    ours = preprocess.centre_crop(picture((301, 275)))
    torch.testing.assert_close(ours, torchvisions(preprocess, picture((301, 275))))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 120), height=st.integers(1, 120))
def test_any_size_has_a_centre(width: int, height: int) -> None:
    assert SMALL.centre_crop(picture((width, height))).shape == (3, 32, 32)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    short=st.integers(1, 100),
    multiple=st.sampled_from([1, 8, 14, 16]),
)
def test_the_whole_picture_keeps_its_shape(
    width: int, height: int, short: int, multiple: int
) -> None:
    view = SMALL.whole(picture((width, height)), short_side=short, multiple=multiple)
    rows, columns = view.shape[1:]
    assert rows % multiple == columns % multiple == 0
    assert abs(min(rows, columns) - short) <= multiple / 2 or min(rows, columns) == multiple
    assert (rows <= columns) if width >= height else (rows >= columns)
    wanted = min(max(width, height) / min(width, height), 4.0) * min(rows, columns)
    assert abs(max(rows, columns) - wanted) <= multiple / 2


def test_the_whole_picture_shows_all_of_it() -> None:
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 255
    view = SMALL.whole(Image.fromarray(pixels), short_side=32, multiple=16)
    assert view.shape == (3, 32, 64)
    left, right = view[..., :28].mean(), view[..., 36:].mean()
    black, white = SMALL.to_tensor(Image.new("RGB", (1, 1))).mean(), view.max()
    assert left.item() == pytest.approx(black.item(), abs=0.05)
    assert right.item() == pytest.approx(white.item(), abs=0.5)


def test_the_squashed_picture() -> None:
    view = SMALL.squash(picture((90, 30)), multiple=16)
    assert view.shape == (3, 32, 32) or view.shape == (3, 48, 48)
    assert SMALL.squash(picture((90, 30)), multiple=8).shape == (3, 40, 40)


def test_to_tensor_normalises() -> None:
    ours = SMALL.to_tensor(Image.new("RGB", (2, 1), (255, 0, 51)))
    colour = zip((1.0, 0.0, 0.2), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    expected = [(value - m) / s for value, m, s in colour]
    assert ours.shape == (3, 1, 2)
    assert ours[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
@pytest.mark.parametrize("view", ["centre_crop", "whole", "squash", "to_tensor"])
def test_other_modes_become_rgb_first(mode: str, view: str) -> None:
    arguments: dict[str, dict[str, Any]] = {
        "whole": {"short_side": 32, "multiple": 8},
        "squash": {"multiple": 8},
    }
    source = picture((36, 41), mode)
    look = getattr(SMALL, view)
    ours = look(source, **arguments.get(view, {}))
    assert ours.shape[0] == 3
    expected = look(source.convert("RGB"), **arguments.get(view, {}))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_a_model_of_one_channel() -> None:
    grey = Preprocess(resize=36, crop=32, copy_size=40, mean=(0.5,), std=(0.25,))
    view = grey.centre_crop(picture((50, 40)))
    assert view.shape == (1, 32, 32)
    torch.testing.assert_close(view, torchvisions(grey, picture((50, 40), "L")), rtol=0, atol=1e-5)


def test_channels_that_no_file_has() -> None:
    odd = Preprocess(resize=36, crop=32, copy_size=40, mean=(0.5,) * 2, std=(0.5,) * 2)
    with pytest.raises(ValueError, match="2 channels"):
        odd.centre_crop(picture((50, 40)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resize": 0}, "resize is 0"),
        ({"crop": -1}, "crop is -1"),
        ({"copy_size": True}, "copy_size is True"),
        ({"crop": 300}, "crop 300 is larger than resize 256"),
        ({"mean": ()}, "0 channels"),
        ({"mean": (0.5,)}, "mean has 1 channels and std 3"),
        ({"mean": (0.1, float("inf"), 0.1)}, "not finite"),
        ({"std": (0.1, 0.0, 0.1)}, "std"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocess(**changes)


@pytest.mark.parametrize(
    ("side", "patch", "sizes"),
    [(224, 16, (256, 224, 320)), (48, 8, (55, 48, 72)), (64, 16, (73, 64, 96))],
)
def test_sizes_in_the_papers_proportion(side: int, patch: int, sizes: tuple[int, int, int]) -> None:
    made = Preprocess.in_proportion(side, patch_size=patch)
    assert (made.resize, made.crop, made.copy_size) == sizes


def test_the_mode_that_a_model_sees() -> None:
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        assert Preprocess.in_proportion(32, patch_size=8, channels=channels).mode == mode
    with pytest.raises(ValueError, match=r"5 channels .* 1 \(grey\), 3 \(RGB\) and 4 \(RGBA\)"):
        assert Preprocess.in_proportion(32, patch_size=8, channels=5).mode


def test_transparency_is_kept_for_those_who_see_it() -> None:
    clear = picture((8, 6), "RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((8, 6)))
    white = Image.alpha_composite(Image.new("RGBA", (8, 6), (255, 255, 255, 255)), clear)
    for kind in ("PNG", "WEBP"):
        with io.BytesIO() as file:
            clear.save(file, kind, lossless=True, exact=True)
            with Image.open(file) as opened:
                kept = to_mode(opened, "RGBA")
            assert np.array_equal(np.asarray(kept), np.asarray(clear))
            for mode in ("RGB", "L"):
                with Image.open(file) as opened:
                    flat = to_mode(opened, mode)
                assert flat.mode == mode
                expected = white.convert("RGB").convert(mode)
                assert np.array_equal(np.asarray(flat), np.asarray(expected))
    assert over_white(clear).mode == "RGB"
    assert np.array_equal(np.asarray(to_mode(clear.copy(), "RGB")), np.asarray(over_white(clear)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("source", ["1", "L", "I;16", "F", "P", "CMYK", "RGB"])
def test_what_has_no_transparency_is_opaque(source: str, mode: Mode) -> None:
    if source in ("I;16", "F"):
        made = Image.fromarray(np.full((3, 4), 1, np.uint16 if source == "I;16" else np.float32))
    else:
        made = picture((4, 3), source)
    found = to_mode(made, mode)
    assert found.mode == mode
    if mode == "RGBA":
        assert found.getextrema()[3] == (255, 255)
        assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(to_rgb(made)))
