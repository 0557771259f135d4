"""JPEGs decoded at a reduced scale: embeddings stay those of the whole picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone.pretrained import load_model
from service.encoder import Array, AttentionTask, Task, TorchEncoder
from service.errors import ImageError
from service.images import Limits, decode, decode_reduced
from tests.service.pictures import encoded, noise, upright_and_turned

LIMITS = Limits(max_bytes=10**8, max_pixels=20_000_000)
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
real_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="real pictures are not there")


def reduced(content: bytes, least: int, mode: str = "RGB") -> Image.Image:
    made = decode_reduced(
        content, LIMITS, param="x", mode=mode, needed=lambda size: [(least, least)]
    )
    return made.picture


@pytest.mark.parametrize(
    ("least", "side"), [(800, 800), (401, 800), (400, 400), (200, 200), (100, 100), (1, 100)]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_no_smaller_than_needed(kind: str, least: int, side: int) -> None:
    content = encoded(noise(1, (800, 800)), kind)
    picture = reduced(content, least)
    assert picture.size == (side, side)
    whole = decode(content, LIMITS, param="x").resize(picture.size, Image.Resampling.BOX)
    difference = np.asarray(picture, dtype=float) - np.asarray(whole)
    assert np.abs(difference).mean() < 1.5


def test_every_use_counts() -> None:
    content = encoded(noise(1, (800, 400)), "JPEG")
    made = decode_reduced(
        content, LIMITS, param="x", mode="RGB", needed=lambda _: [(10, 10), (300, 60)]
    )
    assert made.picture.size == (400, 200)


def test_where_a_picture_ends_that_the_scale_does_not_divide() -> None:
    for kind in ("JPEG", "PNG"):
        content = encoded(noise(1, (803, 601)), kind)
        made = decode_reduced(content, LIMITS, param="x", mode="RGB", needed=lambda _: [(100, 100)])
        assert made.picture.size == (201, 151)
        assert made.extent == (803 / 4, 601 / 4)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_orientation_still_holds(orientation: int) -> None:
    upright, content = upright_and_turned(orientation, "JPEG")
    picture = reduced(content, 4)
    assert picture.size == (upright.width // 4, upright.height // 4)
    small = upright.resize(picture.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(picture, dtype=float) - np.asarray(small)).mean() < 12


def test_limits_are_those_of_the_whole_picture() -> None:
    content = encoded(Image.new("L", (5000, 4001)), "JPEG")
    with pytest.raises(ImageError) as caught:
        reduced(content, 10)
    assert caught.value.status == 413


def test_grey_and_transparent_pictures() -> None:
    assert reduced(encoded(noise(1, (64, 64)).convert("L"), "JPEG"), 8).mode == "RGB"
    assert reduced(encoded(noise(1, (64, 64)).convert("CMYK"), "JPEG"), 8).size == (8, 8)
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert reduced(encoded(clear, "PNG"), 8).getpixel((3, 3)) == (255, 255, 255)
    assert reduced(encoded(clear, "PNG"), 8, "RGBA").mode == "RGBA"


@pytest.fixture(scope="module")
def encoder() -> TorchEncoder:
    return TorchEncoder(load_model("default"), device="cpu")


@real_photos
@pytest.mark.parametrize(
    ("task", "reduction"),
    [("cls", 4), ("copy", 4), (AttentionTask(block=11, resolution=137), 2), ("cls", 8)],
)
def test_results_are_those_of_the_whole_picture(
    encoder: TorchEncoder, task: Task, reduction: int
) -> None:
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))[::63]]
    side = 311 if reduction < 8 else 1337  # not divided: the last pixels stand for fewer
    for i, first in enumerate(photos):
        sheet = Image.new("RGB", (3 * side, 3 * side - 7))
        for place in range(9):
            tile = photos[(i + place) % len(photos)] if place else first
            sheet.paste(tile.resize((side, side)), (place % 3 * side, place // 3 * side))
        content = encoded(sheet, "JPEG", quality=90)
        made = decode_reduced(
            content,
            LIMITS,
            param="x",
            mode="RGB",
            needed=lambda size: [encoder.needed(task, size)],
        )
        assert round(sheet.width / made.picture.width) == reduction
        (found,) = encoder.run(task, [encoder.prepare(task, made.picture, extent=made.extent)])
        (whole,) = encoder.run(task, [encoder.prepare(task, decode(content, LIMITS, param="x"))])
        assert cosine(found, whole) >= 0.9999
        if task == "cls":
            searched = [encoder.similarity(one[None]) for one in (found, whole)]
            assert cosine(*searched) >= 0.999


def cosine(one: Array, other: Array) -> float:
    one, other = one.ravel(), other.ravel()
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
