"""Copies made by transformations: fixed by a seed, and as hard as their names say."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageStat

from backbone.pretrained import load_model
from tests.training.conftest import CPU, ROOT, picture, write_pictures
from training.decoding import decode
from training.evaluation.copy_search import STRANGER, Settings, copy_figures, search
from training.evaluation.features import embedder
from training.evaluation.synthetic_copies import (
    Roles,
    SyntheticCopies,
    contact_sheet,
    draw_roles,
    synthetic_benchmark,
)
from training.evaluation.transformations import TRANSFORMATIONS
from training.sources import DataError, FolderPictures, JoinedPictures, SomePictures

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
SIZE = (120, 90)


def copy_of(name: str, whole: Image.Image, seed: int = 0) -> Image.Image:
    lent = iter([picture(100 + i, (60, 50)) for i in range(3)])
    return TRANSFORMATIONS[name](whole, random.Random(seed), lambda: next(lent))


def difference(one: Image.Image, other: Image.Image) -> float:
    stat = ImageStat.Stat(ImageChops.difference(one, other.resize(one.size)))
    return sum(stat.mean) / 3


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_each_gives_another_picture_and_leaves_its_own(name: str) -> None:
    whole = Image.effect_noise(SIZE, 60).convert("RGB")
    ImageDraw.Draw(whole).rectangle((10, 10, 40, 30), fill="red")
    before = whole.tobytes()
    copy = copy_of(name, whole)
    assert copy.mode == "RGB"
    assert copy.tobytes() != before
    assert whole.tobytes() == before
    assert copy_of(name, whole).tobytes() == copy.tobytes()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 5)])
def test_each_takes_the_smallest_pictures(name: str, size: tuple[int, int]) -> None:
    assert copy_of(name, picture(1, size)).mode == "RGB"


def test_sizes() -> None:
    whole = picture(1, (100, 100))
    for percent in (80, 50, 30, 10):
        width, height = copy_of(f"crop-{percent}", whole).size
        assert width * height == pytest.approx(100 * percent, rel=0.03)
    assert copy_of("collage", whole).size == (200, 200)
    assert min(copy_of("screenshot", whole).size) >= 100
    assert copy_of("rotate-90", picture(1, SIZE)).size == SIZE[::-1]
    assert copy_of("rotate-45", whole).size[0] in (141, 142, 143)


def test_stronger_ones_change_more() -> None:
    whole = picture(1, SIZE)
    for kind, values in {"jpeg": (75, 30, 10, 3), "blur": (1, 3, 8)}.items():
        changes = [difference(whole, copy_of(f"{kind}-{v}", whole)) for v in values]
        assert changes == sorted(changes)
        assert changes[-1] > 2 * changes[0]


def test_flips_and_grey() -> None:
    whole = picture(1, SIZE)
    pixels = np.asarray(whole)
    assert np.array_equal(np.asarray(copy_of("flip-horizontal", whole)), pixels[:, ::-1])
    assert np.array_equal(np.asarray(copy_of("flip-vertical", whole)), pixels[::-1])
    grey = np.asarray(copy_of("grey", whole))
    assert (grey == grey[..., :1]).all()


def test_a_copy_depends_on_seed_name_and_transformation_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path, 12)
    pictures = FolderPictures(tmp_path)
    strangers = list(range(6, 12))
    whole = SyntheticCopies(pictures, Roles(list(range(6)), strangers, []), "collage", seed=0)
    some = SyntheticCopies(pictures, Roles([3], strangers, []), "collage", seed=0)
    assert some.names == ["collage/003.png", *whole.names[6:]]
    assert (some.read(2), some.read(0)) == (whole.read(7), whole.read(3))
    assert whole.read(3) == whole.read(3)
    other = SyntheticCopies(pictures, Roles(list(range(6)), strangers, []), "collage", seed=1)
    assert other.read(3) != whole.read(3)
    # What is written reads back without loss.
    assert decode(some.read(1), "x").tobytes() == some.picture(1).tobytes()


def test_pictures_of_one_name_from_two_folders_lend_to_each_other(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    pictures = JoinedPictures([FolderPictures(tmp_path)] * 4)
    benchmark = synthetic_benchmark(pictures, seed=0, transformations=["collage"])
    for row in range(len(benchmark.queries.names)):
        assert benchmark.queries.read(row)


def test_roles_do_not_depend_on_the_order_of_names() -> None:
    names = [f"{i}.jpg" for i in range(20)]
    roles = draw_roles(names, seed=3, count=5)
    assert (len(roles.originals), len(roles.strangers), len(roles.distractors)) == (5, 5, 10)
    assert sorted([*roles.originals, *roles.strangers, *roles.distractors]) == list(range(20))
    backwards = draw_roles(names[::-1], seed=3, count=5)
    assert [names[::-1][i] for i in backwards.originals] == [names[i] for i in roles.originals]
    assert draw_roles(names, seed=4, count=5) != roles
    assert len(draw_roles(names, seed=3).originals) == 6
    assert len(draw_roles(["x"] * 400, seed=3).originals) == 100


@pytest.mark.parametrize(("pictures", "count"), [(7, None), (20, 3), (20, 11)])
def test_too_few_pictures(pictures: int, count: int | None) -> None:
    with pytest.raises(DataError, match=f"{pictures} pictures with .* copied originals: expected"):
        draw_roles([str(i) for i in range(pictures)], seed=0, count=count)


def test_half_of_the_copies_have_no_original(tmp_path: Path) -> None:
    write_pictures(tmp_path, 11)
    benchmark = synthetic_benchmark(FolderPictures(tmp_path), seed=0, count=4)
    assert list(benchmark.blocks) == list(TRANSFORMATIONS)
    assert len(benchmark.query_groups) == len(benchmark.queries.names) == 8 * len(TRANSFORMATIONS)
    assert (benchmark.query_groups == STRANGER).sum() == 4 * len(TRANSFORMATIONS)
    assert len(benchmark.database.names) == len(benchmark.database_groups) == 7
    rows = benchmark.blocks["text"]
    for row in rows:
        name = benchmark.queries.names[row].removeprefix("text/")
        group = int(benchmark.query_groups[row])
        if group == STRANGER:
            assert name not in benchmark.database.names
        else:
            assert benchmark.database.names[benchmark.database_groups.tolist().index(group)] == name


def test_contact_sheet(tmp_path: Path) -> None:
    write_pictures(tmp_path, 8)
    sheet = contact_sheet(FolderPictures(tmp_path), seed=0)
    assert sheet.width * sheet.height > len(TRANSFORMATIONS) * 200 * 200


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"{PHOTOS.name} is not in {PHOTOS.parent}")
def test_photographs() -> None:
    """With the model in the repository, easy copies are found more often than hard ones."""
    easy = ("jpeg-75", "blur-1", "crop-80", "flip-horizontal")
    hard = ("crop-10", "jpeg-3", "rotate-45", "colour")
    pictures = SomePictures(FolderPictures(PHOTOS), range(0, 40, 2))
    benchmark = synthetic_benchmark(pictures, seed=0, count=5, transformations=easy + hard)
    artifact = load_model("default").artifact
    view = partial(artifact.preprocess.squash, multiple=artifact.architecture.patch_size)
    embed = embedder(artifact, CPU.device, descriptors=["copy"])
    found = search(
        benchmark,
        Settings(view, embed, CPU, 32, 0),
        {"none": lambda vectors: F.normalize(vectors, dim=1)},
        descriptor="copy",
    )
    blocks = copy_figures(benchmark, found["none"])["blocks"]

    def recall(names: Sequence[str]) -> float:
        return sum(float(blocks[name]["recall_at_1"]) for name in names) / len(names)

    assert recall(easy) > 90
    assert recall(easy) > recall(hard) + 20
