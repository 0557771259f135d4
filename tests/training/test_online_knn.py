import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backbone.architectures import Architecture
from backbone.preprocess import Preprocess
from tests.training.conftest import command, finish
from tests.training.knn_process import backbones, networks, recipe
from tests.training.tiny_runs import tiles
from training.attention_maps import attention_maps, read_film
from training.config import ConfigError
from training.distributed import World
from training.evaluation import knn
from training.evaluation.labelled import open_train_and_val
from training.inspection import plain_backbone
from training.online_knn import OnlineKnn
from training.rows import read_rows
from training.sources import DataError, open_pictures

CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tiles of four real pictures: of each, 10 to learn from and 6 to ask for."""
    for i, tile in enumerate(tiles()):
        part = "train" if i % 16 < 10 else "val"
        path = tmp_path / part / f"class{i // 16}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile.save(path)
    return tmp_path


def test_it_is_the_evaluation_of_a_finished_model(folder: Path) -> None:
    made = recipe(folder)
    found = backbones(made)
    online = OnlineKnn(made, CPU)
    results = online.measure(7, 1, found)
    view = Preprocess.in_proportion(16, patch_size=8).centre_crop
    for name, backbone in found.items():
        backbone.eval()
        with torch.inference_mode():
            offline = knn.evaluate(
                *open_train_and_val([f"{folder}/train"], [f"{folder}/val"]),
                view,
                lambda batch, network=backbone: {"cls": network(batch).cls},
                ks=[5],
                here=CPU,
                workers=0,
            )["cls"]["5"]
        assert results[f"knn/{name}_top1"] == pytest.approx(offline["top1"])
        assert results[f"knn/{name}_top5"] == pytest.approx(offline["top5"])
    assert 25 < results["knn/teacher_top1"] <= 100
    # From kept pictures the second time; a run that goes on from step 7 has its row once.
    assert online.measure(9, 2, found) == results
    online.measure(7, 1, found)
    rows = read_rows(folder / "run" / "knn.csv")
    assert [(row["step"], row["network"]) for row in rows] == [
        ("7", "student"),
        ("7", "teacher"),
    ]
    assert float(rows[1]["top1"]) == pytest.approx(results["knn/teacher_top1"], rel=1e-4)


def test_pictures_that_do_not_fit_in_memory_are_read_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(folder)
    kept = OnlineKnn(made, CPU)
    monkeypatch.setattr("training.online_knn._KEPT_BYTES", 1000)
    monkeypatch.setattr("training.online_knn._SIMILARITIES", 100)  # chunks of two queries
    read = OnlineKnn(made, CPU)
    expected = kept.measure(1, 0, backbones(made))
    for _ in range(2):
        assert read.measure(1, 0, backbones(made)) == expected
    (folder / "train" / "class0" / "00.png").unlink()
    capsys.readouterr()
    read.measure(1, 0, backbones(made))
    assert "00.png" in capsys.readouterr().err  # read anew, and left out
    assert kept.measure(1, 0, backbones(made)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_does_not_notice(folder: Path, workers: int) -> None:
    made = recipe(folder)
    made = replace(made, data=replace(made.data, workers=workers))
    found = backbones(made)
    found["student"].get_submodule("blocks").eval()  # a mode of its own: not only the root's
    modes = [module.training for module in found["student"].modules()]
    weights = {name: p.clone() for name, p in found["student"].state_dict().items()}
    random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    OnlineKnn(made, CPU).measure(1, 0, found)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert [module.training for module in found["student"].modules()] == modes
    torch.testing.assert_close(dict(found["student"].state_dict()), weights, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in found["student"].parameters())
    pictures = torch.randn(2, 3, 16, 16, requires_grad=True)
    found["student"](pictures).cls.sum().backward()  # no tensor was left in inference mode


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18", "regnet_y_400mf"])
def test_a_plain_backbone_gives_what_the_runs_own_would(name: str) -> None:
    architecture = Architecture(name=name, patch_size=8, image_size=32)
    torch.manual_seed(0)
    backbone, pictures = architecture.build(drop_path_rate=0.5), torch.randn(3, 3, 32, 32)
    backbone(pictures)  # moves a BatchNorm's averages
    plain = plain_backbone(backbone, architecture, CPU.device)
    assert backbone.training
    with torch.inference_mode():
        torch.testing.assert_close(plain(pictures).cls, backbone.eval()(pictures).cls)


def test_damaged_pictures_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(folder)
    expected = OnlineKnn(made, CPU).measure(1, 0, backbones(made))
    for part in ("train", "val"):
        (folder / part / "class0" / "zz.png").write_bytes(b"no picture")
    assert OnlineKnn(made, CPU).measure(1, 0, backbones(made)) == expected
    assert "k-NN leaves out 1 of knn.train: picture 'class0/zz.png'" in capsys.readouterr().err


def test_what_cannot_be_used_is_refused_before_the_run(folder: Path) -> None:
    with pytest.raises(DataError, match=r"knn\.k = 41: knn\.train holds 40 pictures"):
        OnlineKnn(recipe(folder, k=41), CPU)
    with pytest.raises(DataError, match="lies in no class folder"):
        OnlineKnn(recipe(folder, train=f"{folder}/train/class0"), CPU)
    with pytest.raises(DataError, match="does not exist"):
        OnlineKnn(recipe(folder, val="nowhere"), CPU)
    (folder / "train" / "class3").rename(folder / "train" / "other")
    with pytest.raises(DataError, match=r"1 classes that knn\.train lacks, e\.g\. \['class3'\]"):
        OnlineKnn(recipe(folder), CPU)
    made = recipe(folder)
    made = replace(made, data=replace(made.data, channels=6, mean=(), std=()))
    with pytest.raises(ConfigError, match=r"data\.channels = 6"):
        OnlineKnn(made, CPU)


def test_processes_with_weights_in_shards_share_the_work_and_agree(folder: Path) -> None:
    (folder / "val" / "class2" / "45.png").unlink()  # no even share
    (folder / "train" / "class2" / "33.png").unlink()
    made = recipe(folder)
    one = OnlineKnn(made, CPU).measure(3, 0, networks(made, CPU))
    maps = attention_maps(made, open_pictures([folder / "train"]), CPU)
    assert maps is not None
    maps.store(3, 0, networks(made, CPU)["teacher"])
    expected = read_film(folder / "run")
    shutil.rmtree(folder / "run")
    launcher = command("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    status, _, err = finish([*launcher, "tests.training.knn_process", str(folder)])
    assert status == 0, err

    for rank in (0, 1):
        assert json.loads((folder / f"2.{rank}.json").read_text()) == pytest.approx(one)
    assert len(read_rows(folder / "run" / "knn.csv")) == 2
    film = read_film(folder / "run")
    assert film is not None
    assert expected is not None
    np.testing.assert_allclose(film.maps, expected.maps, rtol=2e-3)
