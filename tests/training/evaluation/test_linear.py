import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from backbone.architectures import Architecture
from backbone.artifact import Artifact, read_artifact, write_artifact
from backbone.classifier import read_classifier
from backbone.descriptors import describe
from backbone.preprocess import Preprocess
from tests.training.conftest import command, finish, start
from tests.training.tiny_runs import tiles
from training import snapshot
from training.evaluation.__main__ import main
from training.evaluation.labelled import open_train_and_val
from training.evaluation.linear import default_descriptor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of four real pictures, 33 to learn from and 23 to ask for, and an untrained model."""
    folder = tmp_path_factory.mktemp("linear")
    for i, tile in enumerate(tiles()):
        part = "train" if i % 16 < 9 else "val"
        path = folder / part / f"class{i // 16}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile.save(path)
    for name in ("train/class0/00.png", "train/class1/16.png", "train/class2/32.png"):
        (folder / name).unlink()
    architecture = Architecture(name="vit_tiny", patch_size=8, image_size=16)
    torch.manual_seed(0)
    artifact = Artifact(
        architecture=architecture,
        preprocess=Preprocess(resize=18, crop=16, copy_size=16),
        weights=architecture.build().state_dict(),
    )
    write_artifact(artifact, folder / "model.safetensors")
    return folder


def arguments(folder: Path, *more: str, epochs: int = 4) -> list[str]:
    paths = ["--train", f"{folder}/train", "--val", f"{folder}/val"]
    return [
        "linear",
        *("--model", f"{folder}/model.safetensors", "--device", "cpu", *paths),
        *("--workers", "0", "--batch-size", "16", "--epochs", str(epochs), *more),
    ]


def ask(capsys: pytest.CaptureFixture[str], given: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*given, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], given: list[str]) -> str:
    capsys.readouterr()
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert not out
    return err.strip().splitlines()[-1]


def test_the_figures_are_those_of_the_classifier_that_is_saved(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = arguments(folder, "--lr", "0.001", "0.3", "3", "--out", str(out), epochs=8)
    found = ask(capsys, given)
    assert list(found["linear"]) == ["0.001", "0.3", "3.0"]
    best = found["best"]
    assert best["top1"] == max(each["top1"] for each in found["linear"].values()) > 40
    assert found["linear"][str(best["lr"])]["top1"] == best["top1"]
    assert [each["epoch"] for each in found["curve"]] == list(range(1, 9))
    losses = [each["rates"]["0.001"]["loss"] for each in found["curve"]]
    assert losses[-1] < losses[0]  # higher rates jump about on so few pictures
    assert found["protocol"]["descriptor"] == "last4"

    artifact = read_artifact(folder / "model.safetensors")
    assert found["fingerprint"] == artifact.fingerprint
    classifier = read_classifier(out / "classifier.safetensors", artifact)
    assert classifier.classes == ("class0", "class1", "class2", "class3")
    assert (classifier.base_lr, classifier.top1) == (best["lr"], best["top1"])
    _, val = open_train_and_val([f"{folder}/train"], [f"{folder}/val"])
    views = torch.stack([artifact.preprocess.centre_crop(tiles()[i]) for i in _numbers(val)])
    with torch.inference_mode():
        logits = classifier(describe(artifact.network(), views, ["last4"])["last4"])
    hits = (logits.argmax(dim=1) == val.labels).double().mean().item()
    assert 100 * hits == pytest.approx(best["top1"])
    assert not (out / "features").exists()

    # Once more: the run is finished, and tells the same without a forward; as a table, too.
    assert ask(capsys, given)["curve"] == found["curve"]
    assert main(given) == 0
    text = capsys.readouterr().out
    assert text.count("<- ") == 2 - (best["lr"] == 0.001)
    assert "the paper's" in text
    marked = next(line for line in text.splitlines() if "best" in line)
    assert f"top-1 {best['top1']:5.2f} %" in marked


def _numbers(labelled: Any) -> list[int]:
    return [int(Path(name).stem) for name in labelled.pictures.names]


def test_a_seed_is_a_run_and_centre_crops_are_embedded_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(folder, "--lr", "0.3", "1e40", "--augment", "none", epochs=6)
    one = ask(capsys, given)
    assert one["best"]["top1"] > 40
    assert one["curve"] == ask(capsys, given)["curve"]
    assert one["curve"] != ask(capsys, [*given, "--seed", "1"])["curve"]
    # The second rate has diverged: nothing it says is right, and its loss is no number.
    assert one["linear"]["1e+40"]["top1"] == 0.0
    assert one["curve"][-1]["rates"]["1e+40"]["loss"] is None
    assert main(given) == 0
    assert "not the paper's" in capsys.readouterr().out


def test_a_run_that_is_killed_is_the_run_that_was_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rest = ["--lr", "0.01", "0.3"]
    expected = ask(capsys, arguments(folder, *rest, "--out", str(whole), epochs=20))
    given = arguments(folder, *rest, "--out", str(killed), epochs=20)
    process = start([*command("training.evaluation"), *given])
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (killed / "snapshots" / "step_000000003.pt").exists():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "classifier.safetensors").exists()
    found = ask(capsys, given)
    assert found["curve"] == expected["curve"]
    assert found["linear"] == expected["linear"]
    one, other = (each / "classifier.safetensors" for each in (whole, killed))
    assert one.read_bytes() == other.read_bytes()


def test_settings_that_differ_from_the_snapshots_are_refused_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    given = [*arguments(folder, "--lr", "0.3", "--augment", "none", epochs=1), *out]
    assert main(given) == 0
    for changed, message in (
        (["--lr", "0.3", "0.1"], "--lr was [0.3] and is [0.3, 0.1]"),
        (["--epochs", "2"], "--epochs was 1 and is 2"),
        (["--seed", "7"], "--seed was 0 and is 7"),
        (["--augment", "crop"], "--augment was 'none' and is 'crop'"),
        (["--descriptor", "cls"], "--descriptor was 'last4' and is 'cls'"),
        (["--batch-size", "8"], "--batch-size x processes was 16 and is 8"),
        (["--precision", "bf16"], "--precision was 'fp32' and is 'bf16'"),
    ):
        error = refused(capsys, [*given, *changed])
        assert error.startswith(f"error: --out {tmp_path / 'out'} holds a run of other settings")
        assert message in error
    shutil.copytree(folder / "val", tmp_path / "val")
    (tmp_path / "val" / "class0" / "09.png").unlink()
    assert "--val (hash of names) was" in refused(capsys, [*given, "--val", str(tmp_path / "val")])


def test_what_cannot_be_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*more: str) -> str:
        return refused(capsys, arguments(folder, *more))

    assert "--lr = -1.0: must be above 0" in error("--lr", "0.1", "-1")
    assert "--lr = [0.1, 0.1]: must differ" in error("--lr", "0.1", "0.1")
    assert "--descriptor: descriptor 'last13': the" in error("--descriptor", "last13")
    assert "--seed = 4294967296" in error("--seed", str(2**32))
    (tmp_path / "file").touch()
    assert "no folder for features" in error("--out", str(tmp_path / "file"))
    everything = ["--lr", "1e40", "--augment", "none", "--out", str(tmp_path / "diverged")]
    assert "--lr: every rate has diverged" in error(*everything)
    shutil.copytree(folder / "train", tmp_path / "train")
    train = ["--train", str(tmp_path / "train")]
    (tmp_path / "train" / "class1" / "bad.png").write_bytes(b"no picture")
    assert "picture 'class1/bad.png' cannot be read" in error(*train)
    assert "picture 'class1/bad.png' cannot be read" in error(*train, "--workers", "1")
    assert not multiprocessing.active_children()
    val = ["--val", str(tmp_path / "train"), "--workers", "2"]
    assert "picture 'class1/bad.png' cannot be read" in error(*val)
    assert not multiprocessing.active_children()
    (tmp_path / "train" / "class4").mkdir()
    shutil.copy(folder / "val" / "class0" / "09.png", tmp_path / "train" / "class4")
    assert "class 'class4' in --train has 1 picture" in error(*train)
    shutil.rmtree(tmp_path / "train" / "class0")
    shutil.rmtree(tmp_path / "train" / "class4")
    assert "class that --train lacks, e.g. 'class0'" in error(*train)


def test_damaged_or_foreign_snapshots_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot.save(tmp_path, 1, {"step": 1, "student": {}})
    given = arguments(folder, "--out", str(tmp_path))
    assert "holds another program's run" in refused(capsys, given)
    snapshot.path_of(tmp_path, 1).write_bytes(b"")
    assert "every snapshot of this run is damaged" in refused(capsys, given)


def test_two_processes_find_what_one_finds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """33 pictures in batches of 16: of the last step, one process has a part of nothing."""
    more = ["--lr", "0.01", "0.3", "--json"]
    one = ask(capsys, arguments(folder, *more))
    together = ["--out", str(tmp_path / "out"), "--save", str(tmp_path / "two.json")]
    launcher = command("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    rest = [*arguments(folder, *more, *together), "--batch-size", "8"]
    status, out, err = finish([*launcher, "training.evaluation", *rest])
    assert status == 0, err
    two = json.loads(out)  # one of them speaks
    assert two == json.loads((tmp_path / "two.json").read_text())
    assert two["protocol"] == one["protocol"]
    for ours, theirs in zip(one["curve"], two["curve"], strict=True):
        for rate, found in ours["rates"].items():
            assert theirs["rates"][rate] == pytest.approx(found, rel=1e-4), rate
    # Gone on with by one process that takes the same batch, it is the same run.
    single = arguments(folder, *more, "--out", str(tmp_path / "out"))
    assert ask(capsys, single)["curve"] == two["curve"]


@pytest.mark.parametrize(
    ("name", "descriptor"),
    [
        ("vit_tiny", "last4"),
        ("vit_small", "last4"),
        ("vit_base", "cls+mean"),
        ("vit_large", "cls+mean"),
        ("resnet50", "cls"),
    ],
)
def test_the_papers_feature_forms(name: str, descriptor: str) -> None:
    assert default_descriptor(Architecture(name=name)) == descriptor
