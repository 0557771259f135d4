import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from backbone.architectures import Architecture
from backbone.artifact import Artifact
from backbone.preprocess import Preprocess
from tests.training.conftest import CPU, picture, write_pictures
from training.augmentations import random_box
from training.config import ConfigError
from training.distributed import World
from training.evaluation.features import embedder
from training.evaluation.linear_features import (
    SCALE,
    Frozen,
    Order,
    features_folder,
    of_random_crops,
    random_crop,
    store,
)
from training.sources import open_pictures

PREPROCESS = Preprocess(resize=18, crop=16, copy_size=16)


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    architecture = Architecture(name="vit_tiny", patch_size=8, image_size=16)
    torch.manual_seed(0)
    weights = architecture.build().state_dict()
    artifact = Artifact(architecture=architecture, preprocess=PREPROCESS, weights=weights)
    return Frozen(
        preprocess=PREPROCESS,
        embed=embedder(artifact, CPU.device, descriptors=["last4"]),
        descriptor="last4",
        length=768,
        batch_size=4,
        workers=0,
    )


def test_the_training_view_is_torchvisions() -> None:
    source, flips = picture(1, size=(90, 61)), 0
    for seed in range(20):
        found = random_crop(source, PREPROCESS, random.Random(seed))
        rng = random.Random(seed)
        left, top, right, bottom = random_box(*source.size, SCALE, rng)
        expected = vision.resized_crop(
            source, top, left, bottom - top, right - left, [16, 16], InterpolationMode.BILINEAR
        )
        if flipped := rng.random() < 0.5:
            expected = vision.hflip(expected)
        flips += flipped
        expected = vision.normalize(
            vision.to_tensor(expected), list(PREPROCESS.mean), list(PREPROCESS.std)
        )
        torch.testing.assert_close(found, expected)
    assert 4 < flips < 16


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_see_together_what_one_sees(size: int) -> None:
    whole = list(Order(count=13, batch=6, seed=4, here=CPU).batches(0, 3))
    worlds = [World(rank, size, CPU.device) for rank in range(size)]
    parts = [Order(count=13, batch=6, seed=4, here=each).batches(0, 3) for each in worlds]
    joined = [[key for part in step for key in part] for step in zip(*parts, strict=True)]
    assert joined == whole
    assert [len(step) for step in whole] == [6, 6, 1] * 3  # the last one takes what is left
    for epoch in range(3):
        own = [key for step in whole[3 * epoch : 3 * epoch + 3] for key in step]
        assert sorted(own) == [(epoch, place) for place in range(13)]
    assert [place for _, place in whole[0]] != [place for _, place in whole[3]]


def test_going_on_is_the_same_as_not_having_stopped(frozen: Frozen, tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    pictures = open_pictures([tmp_path])
    order = Order(count=5, batch=4, seed=2, here=CPU)
    whole = list(of_random_crops(pictures, frozen, order, start=0, stop=3))
    rest = list(of_random_crops(pictures, frozen, order, start=2, stop=3))
    assert len(rest) == 2
    for (places, features), (others, expected) in zip(rest, whole[4:], strict=True):
        assert torch.equal(places, others)
        assert torch.equal(features, expected)
    earlier = torch.cat([features for _, features in whole[:2]])
    order_of = torch.cat([places for places, _ in whole[:2]]).tolist()
    for place, features in zip(rest[0][0].tolist(), rest[0][1], strict=True):
        assert not torch.equal(features, earlier[order_of.index(place)])  # another epoch's crop


def test_features_in_a_file(frozen: Frozen, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 6)
    pictures = open_pictures([tmp_path / "pictures"])
    with features_folder(None, CPU) as folder:
        rows = store(folder / "train", pictures, frozen, CPU)
        assert (folder / "train").stat().st_size == 6 * 768 * 4
        for i in range(6):
            view = PREPROCESS.centre_crop(picture(i))[None]
            torch.testing.assert_close(
                torch.from_numpy(rows[i].copy()), frozen.embed(view)["last4"][0]
            )
        for rank in range(8):  # two of them have no picture
            shared = store(folder / "shared", pictures, frozen, World(rank, 8, CPU.device))
        np.testing.assert_allclose(shared, rows, atol=1e-5)
    assert not folder.exists()
    with pytest.raises(ConfigError, match=r"kept in '.*missing/train': No such file"):
        store(tmp_path / "missing" / "train", pictures, frozen, CPU)
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"no folder for features at .*Not a directory"),
        features_folder(tmp_path / "file", CPU),
    ):
        pass
