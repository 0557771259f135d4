import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from backbone.artifact import read_artifact
from tests.training.conftest import TINY_RECIPE, command, finish, toml, write_pictures
from training import export, pretrain, snapshot
from training.config import load_recipe, recipe_from_dict, recipe_to_dict
from training.distributed import World
from training.evaluation.__main__ import main as evaluate
from training.state import Training, make_network, make_training, restore

OVERRIDES = ["epochs=2", "optimizer.lr=0.5"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short run, so that teacher and student differ."""
    folder = tmp_path_factory.mktemp("export")
    write_pictures(folder / "pictures", 8)
    (folder / "recipe.toml").write_text(toml(TINY_RECIPE))
    overrides = [f"data.train={folder / 'pictures'}", f"run_dir={folder / 'run'}", *OVERRIDES]
    assert pretrain.main([str(folder / "recipe.toml"), *overrides]) == 0
    yield folder / "run"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def model(run_dir: Path) -> Path:
    out = run_dir / "model.safetensors"
    assert export.main([str(run_dir), str(out), "--licence", "CC0-1.0"]) == 0
    return out


def networks(run_dir: Path) -> Training:
    """The student and teacher that the run's last snapshot holds, as training restores them."""
    recipe_json = json.loads((run_dir / "recipe.json").read_text())
    folder = run_dir.parent
    train = f"data.train={recipe_json['data']['train'][0]}"
    recipe = load_recipe(folder / "recipe.toml", [train, f"run_dir={run_dir}", *OVERRIDES])
    world = World(0, 1, torch.device("cpu"))
    training = make_training(recipe, world)
    found = snapshot.latest(run_dir)
    assert found is not None
    assert found[0] == 4
    scale = {"pictures": 8, "processes": 1}
    restore(training, snapshot.load(found[1]), recipe=recipe, scale=scale)
    return training


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_an_export_gives_the_networks_cls_exactly(run_dir: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "new folder" / "model.safetensors"
    flags = ["--student"] if name == "student" else []
    assert export.main([str(run_dir), str(out), *flags]) == 0
    pictures = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        trained = getattr(networks(run_dir), name).backbone(pictures).cls
        exported = read_artifact(out).network()(pictures).cls
        other = read_artifact(out)
    assert torch.equal(exported, trained)
    assert other.provenance["network"] == name


def test_teacher_and_student_are_not_the_same(run_dir: Path) -> None:
    training = networks(run_dir)
    pictures = torch.randn(2, 3, 16, 16)
    teacher, student = (n.backbone(pictures).cls for n in (training.teacher, training.student))
    assert not torch.allclose(teacher, student, atol=1e-5)


def test_the_header_tells_where_the_model_comes_from(model: Path) -> None:
    artifact = read_artifact(model)
    assert (artifact.architecture.name, artifact.architecture.patch_size) == ("vit_tiny", 8)
    assert (artifact.preprocess.crop, artifact.preprocess.resize) == (16, 18)
    assert artifact.provenance["licence"] == "CC0-1.0"
    assert artifact.provenance["steps"] == 4
    assert artifact.provenance["recipe"]["seed"] == TINY_RECIPE["seed"]
    assert artifact.quality == {}


def test_half_precision_halves_the_file(
    run_dir: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.safetensors"
    assert export.main([str(run_dir), str(half), "--half"]) == 0
    assert read_artifact(half).fingerprint in capsys.readouterr().out
    assert half.stat().st_size == pytest.approx(model.stat().st_size / 2, rel=0.01)
    pictures = torch.randn(4, 3, 16, 16)
    ours, theirs = (read_artifact(p).network()(pictures).cls for p in (half, model))
    assert not torch.equal(ours, theirs)
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.9999


def test_a_grey_convnet_in_half_precision(tmp_path: Path) -> None:
    """BatchNorm's statistics stay as they are, and the pictures' mean goes along."""
    table = {
        **TINY_RECIPE,
        "data": {"train": ["none"], "channels": 1, "mean": [0.4], "std": [0.2]},
        "model": {"architecture": "mobilenet_v3_small"},
    }
    recipe = recipe_from_dict(table)
    teacher = make_network(recipe, student=False)
    teacher.backbone.train()(torch.randn(4, 1, 32, 32))
    state = {"teacher": teacher.state_dict(), "student": {}, "recipe": recipe_to_dict(recipe)}
    snapshot.save(tmp_path, 1, {**state, "step": 1})
    assert export.main([str(tmp_path), str(tmp_path / "half.safetensors"), "--half"]) == 0
    artifact = read_artifact(tmp_path / "half.safetensors")
    assert (artifact.preprocess.mean, artifact.preprocess.std) == ((0.4,), (0.2,))
    assert artifact.architecture.name == "mobilenet_v3_small"
    exact = teacher.backbone.state_dict()
    for name, tensor in artifact.weights.items():
        is_buffer = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, exact[name] if is_buffer else exact[name].half())


def test_sizes_and_quality_go_into_the_header(run_dir: Path, tmp_path: Path) -> None:
    quality = {"knn": {"20": {"top1": 12.5, "top5": 30.0}}}
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    out = tmp_path / "model.safetensors"
    flags = ["--quality", str(tmp_path / "quality.json")]
    flags += ["--resize", "40", "--crop", "32", "--copy-size", "48"]
    assert export.main([str(run_dir), str(out), *flags]) == 0
    artifact = read_artifact(out)
    assert artifact.quality == quality
    sizes = artifact.preprocess
    assert (sizes.resize, sizes.crop, sizes.copy_size) == (40, 32, 48)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--crop", "7"], "patch_size"),
        (["--crop", "64"], "larger than resize"),
        (["--resize", "0"], "positive"),
        (["--quality", "nowhere.json"], "nowhere.json"),
    ],
)
def test_an_export_that_cannot_be_leaves_the_old_file(
    run_dir: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"what was there")
    assert export.main([str(run_dir), str(out), *flags]) == 2
    assert words in capsys.readouterr().err
    assert out.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_run_without_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path), str(tmp_path / "m.safetensors")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert str(tmp_path) in said
    assert "no snapshot" in said


def test_the_file_must_be_called_safetensors(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        export.main([str(tmp_path), str(tmp_path / "m.pth")])
    assert caught.value.code == 2


def test_a_snapshot_is_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "snapshots").mkdir()
    torch.save({"step": 1, "student": Path("x")}, tmp_path / "snapshots" / "step_000000001.pt")
    with pytest.raises(snapshot.SnapshotError, match="damaged"):
        snapshot.load(tmp_path / "snapshots" / "step_000000001.pt")
    assert export.main([str(tmp_path), str(tmp_path / "m.safetensors")]) == 2


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two folders of two classes that any network can tell apart: dark and bright."""
    for part, offset in (("train", 0), ("val", 4)):
        for name, level in (("dark", 20), ("bright", 220)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(3):
                value = level + offset + i
                Image.new("RGB", (20 + i, 18), (value, value, value)).save(folder / f"{i}.png")
    return tmp_path


def knn(model: Path, folder: Path, *more: str) -> list[str]:
    sources = ["--train", str(folder / "train"), "--val", str(folder / "val")]
    return ["knn", "--model", str(model), *sources, "--workers", "0", "--device", "cpu", *more]


def test_knn_on_the_command_line(model: Path, labelled: Path) -> None:
    arguments = knn(model, labelled, "--k", "1", "3", "--json")
    status, out, err = finish([*command("training.evaluation"), *arguments])
    assert status == 0, err
    printed = json.loads(out.splitlines()[-1])
    perfect = {"top1": 100.0, "top5": 100.0}
    assert printed["knn"] == {"1": perfect, "3": perfect}
    assert printed["fingerprint"] == read_artifact(model).fingerprint


def test_knn_counts_what_is_wrong(
    model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (labelled / "val/dark/0.png").rename(labelled / "val/bright/wrong.png")
    assert evaluate(knn(model, labelled, "--k", "1", "--json")) == 0
    result = json.loads(capsys.readouterr().out)["knn"]["1"]
    assert result["top1"] == pytest.approx(100 * 5 / 6)
    assert evaluate(knn(model, labelled, "--k", "1")) == 0
    assert "top-1 83.33 %" in capsys.readouterr().out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert evaluate(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_knn_mistakes(model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--k 7" in refused(knn(model, labelled, "--k", "7"), capsys)
    assert "nowhere" in refused(knn(Path("nowhere"), labelled, "--k", "1"), capsys)
    (labelled / "val" / "unheard-of").mkdir()
    (labelled / "val/dark/0.png").rename(labelled / "val/unheard-of/0.png")
    said = refused(knn(model, labelled, "--k", "1"), capsys)
    assert "unheard-of" in said
    assert "--train lacks" in said


def test_knn_names_a_broken_picture(
    model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (labelled / "train/dark/1.png").write_bytes(b"no picture")
    assert "'dark/1.png'" in refused(knn(model, labelled, "--k", "1"), capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_knn_on_a_device_that_is_not_there(
    model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "CUDA" in refused(knn(model, labelled, "--k", "1", "--device", "cuda"), capsys)


def test_too_few_pictures_for_a_whitening_are_refused_before_any_is_read(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "extract", lambda *_, **__: pytest.fail("features were computed"))
    out, pictures = tmp_path / "out.safetensors", str(run_dir.parent / "pictures")
    assert export.main([str(run_dir), str(out), "--whiten", pictures]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: whitening of 192 dimensions needs at least 384 pictures, not 8")
    assert not out.exists()
