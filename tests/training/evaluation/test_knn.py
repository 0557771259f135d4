import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbone.architectures import Architecture
from backbone.artifact import Artifact, ArtifactError, write_artifact
from backbone.preprocess import Preprocess
from tests.training.conftest import CPU, command, finish
from tests.training.tiny_runs import tiles
from training.evaluation.__main__ import main
from training.evaluation.knn import accuracy, neighbours, vote

ARCHITECTURE = Architecture(name="vit_tiny", patch_size=8, image_size=16)


def write_model(path: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    preprocess = Preprocess.in_proportion(16, patch_size=8)
    weights = ARCHITECTURE.build().state_dict()
    write_artifact(
        Artifact(architecture=ARCHITECTURE, preprocess=preprocess, weights=weights), path
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tiles of four real pictures: of each, 10 to learn from and 6 to ask for; and a model."""
    for i, tile in enumerate(tiles()):
        part = "train" if i % 16 < 10 else "val"
        path = tmp_path / part / f"class{i // 16}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile.save(path)
    write_model(tmp_path / "model.safetensors")
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    parts = ["--train", str(folder / "train"), "--val", str(folder / "val")]
    model = ["--model", str(folder / "model.safetensors"), "--device", "cpu"]
    return ["knn", *model, *parts, "--k", "1", "5", "--batch-size", "7", *more]


def figures(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main(arguments(folder, "--json", *more)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(arguments(folder, *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_votes_are_weighed() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.8], [0.9, 0.3, 0.3]])
    labels = torch.tensor([[2, 1, 1], [2, 1, 1]])
    # Two votes at 0.8 weigh more than one at 0.9; two at 0.3 do so only when it is warm.
    assert vote(similarity, labels, classes=4, temperature=1.0)[:, 0].tolist() == [1, 1]
    assert vote(similarity, labels, classes=4, temperature=0.2)[:, 0].tolist() == [1, 2]
    # exp(0.9 / 0.002) is above what a float holds; classes without a vote come by their numbers.
    assert vote(similarity[:1], labels[:1], classes=4, temperature=0.002).tolist() == [[2, 1, 0, 3]]


def test_accuracy_counts_the_first_and_the_first_five() -> None:
    ranked = torch.arange(7).repeat(4, 1)
    assert accuracy(ranked, torch.tensor([0, 4, 5, 0])) == {"top1": 50.0, "top5": 75.0}


def test_vectors_that_are_not_finite_are_refused() -> None:
    bank = torch.ones(3, 2)
    bank[1, 1] = torch.inf
    with pytest.raises(ArtifactError, match="'mean' of the model has values that are not finite"):
        neighbours({"mean": torch.ones(1, 2)}, [(torch.arange(3), {"mean": bank})], k=1, here=CPU)


def test_descriptors_compared_in_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = figures(folder, capsys, "--descriptors", "last2", "cls", "cls+mean")
    assert list(both["descriptors"]) == ["last2", "cls", "cls+mean"]
    assert both["knn"] == both["descriptors"]["last2"]
    assert both["protocol"]["descriptors"] == ["last2", "cls", "cls+mean"]
    assert both["descriptors"]["cls"] == figures(folder, capsys)["knn"]
    assert all(0 < each["top1"] <= each["top5"] for each in both["knn"].values())
    assert main(arguments(folder, "--descriptors", "mean", "cls")) == 0
    assert "  cls   k =    5: top-1 " in capsys.readouterr().out


def test_temperature_decides(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near_one = figures(folder, capsys, "--temperature", "0.00001")
    assert near_one["knn"]["5"]["top1"] == near_one["knn"]["1"]["top1"]  # the nearest outvotes all
    for value in ("0", "-1", "nan", "warm"):
        with pytest.raises(SystemExit):
            main(arguments(folder, f"--temperature={value}"))
        assert f"{value!r} is not a finite number above 0" in capsys.readouterr().err


def test_impossible_descriptors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(folder, capsys, "--descriptors", "cls", "clss")
    assert "--descriptors, model 'model': descriptor 'clss' is none of cls, mean" in said
    said = refused(folder, capsys, "--descriptors", "last13")
    assert "'last13': the network has 12 blocks" in said


def test_saved_features_stand_for_the_pictures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = folder / "features"
    descriptors = ["--descriptors", "cls", "mean"]
    computed = figures(folder, capsys, *descriptors, "--save-features", str(saved))
    plain = figures(folder, capsys, *descriptors)
    assert computed["descriptors"] == plain["descriptors"]

    described = json.loads((saved / "train.json").read_text())
    assert described["fingerprint"] == plain["fingerprint"]
    assert described["descriptors"] == {"cls": 192, "mean": 192}
    assert described["classes"] == [f"class{i}" for i in range(4)]
    assert np.load(saved / "train.mean.npy", mmap_mode="r").shape == (40, 192)
    assert np.load(saved / "train.labels.npy").tolist() == [i // 10 for i in range(40)]

    for path in folder.glob("*/class*/*.png"):
        path.write_bytes(b"")  # no picture is read any more
    loaded = figures(folder, capsys, *descriptors, "--load-features", str(saved))
    assert loaded["descriptors"] == computed["descriptors"]
    assert loaded["data"]["features"] == str(saved)
    one = figures(folder, capsys, "--descriptors", "mean", "--load-features", str(saved))
    assert one["knn"] == computed["descriptors"]["mean"]


def test_features_of_something_else_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = folder / "features"
    load = ["--load-features", str(saved)]
    assert "val.json' does not exist; expected a folder that" in refused(folder, capsys, *load)
    figures(folder, capsys, "--save-features", str(saved))

    said = refused(folder, capsys, *load, "--descriptors", "mean")
    assert "val.json' tells of the descriptors cls; --descriptors asks for 'mean'" in said
    said = refused(folder, capsys, *load, "--precision", "bf16")
    assert "precision 'fp32'; this model and data have 'bf16'" in said

    other = folder / "val" / "class0" / "other.png"
    (folder / "val" / "class0" / "10.png").rename(other)
    assert "val.json' tells of features with names_sha256" in refused(folder, capsys, *load)
    other.rename(folder / "val" / "class0" / "10.png")
    whole = (saved / "train.cls.npy").read_bytes()
    (saved / "train.cls.npy").write_bytes(whole[:-8])
    assert "train.cls.npy' cannot be read" in refused(folder, capsys, *load)
    np.save(saved / "train.cls.npy", np.zeros((40, 3), dtype=np.float32))
    assert "holds float32 [40, 3], not float32 [40, 192]" in refused(folder, capsys, *load)
    (saved / "train.cls.npy").write_bytes(whole)
    figures(folder, capsys, *load)

    fingerprint = json.loads((saved / "val.json").read_text())["fingerprint"]
    write_model(folder / "model.safetensors", seed=1)
    assert f"fingerprint '{fingerprint}'; this model" in refused(folder, capsys, *load)
    (saved / "val.json").write_text("{}")
    assert "has format version None; this program reads 1" in refused(folder, capsys, *load)


def test_a_save_that_was_interrupted_is_not_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = folder / "features"
    figures(folder, capsys, "--save-features", str(saved))
    broken = folder / "train" / "class3" / "57.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    assert "57.png" in refused(folder, capsys, "--save-features", str(saved))
    broken.write_bytes(content)
    assert "train.json' does not exist" in refused(folder, capsys, "--load-features", str(saved))


def test_a_folder_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").write_text("a file")
    said = refused(folder, capsys, "--save-features", str(folder / "taken"))
    assert f"--save-features {folder}/taken: " in said


def test_a_result_that_cannot_be_saved_is_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "taken").touch()
    bad = ["--val", str(folder / "nothing")]  # would be refused next
    said = refused(folder, capsys, *bad, "--save", str(folder / "taken" / "found.json"))
    assert said.startswith(f"error: --save: '{folder}/taken/found.json' cannot be written: ")
    assert "it is a folder" in refused(folder, capsys, *bad, "--save", str(folder))
    found = figures(folder, capsys, "--save", str(folder / "new" / "found.json"))
    assert json.loads((folder / "new" / "found.json").read_text()) == found


def test_ctrl_c_does_not_wait_for_workers(folder: Path) -> None:
    """They are shielded from signals for a minute."""
    for i in range(2000):
        (folder / "val" / "class0" / f"more{i}.png").symlink_to(folder / "val/class0/10.png")
    pictures = arguments(folder, "--workers", "1", "--batch-size", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "training.evaluation", *pictures],
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    seen = b""
    # A later count than the first: a worker that is still starting has no shield to be ended from.
    while re.search(rb" [1-9]\d+/2", seen) is None:
        more = os.read(process.stderr.fileno(), 4096)
        assert more, seen.decode()
        seen += more
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert said.endswith(b"KeyboardInterrupt\n")
    assert process.returncode == -signal.SIGINT


def test_two_processes_find_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train" / "class2" / "33.png").unlink()  # no even share
    options = ["--descriptors", "cls", "last2", "--json", "--save-features"]
    alone = figures(folder, capsys, *options, str(folder / "one"))
    launcher = command("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    status, out, err = finish(
        [*launcher, "training.evaluation", *arguments(folder, *options, str(folder / "two"))]
    )
    assert status == 0, err
    together = json.loads(out)
    assert together["environment"]["processes"] == 2
    assert together["descriptors"] == alone["descriptors"]
    for name in ("train.cls", "val.last2", "train.labels"):
        one, two = (np.load(folder / made / f"{name}.npy") for made in ("one", "two"))
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    loaded = figures(folder, capsys, "--load-features", str(folder / "two"))
    assert loaded["knn"] == alone["knn"]


def test_the_command_agrees_with_the_textbook(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One matrix, one loop: the paper's formula on the vectors that were saved."""
    saved = folder / "features"
    found = figures(folder, capsys, "--save-features", str(saved))["knn"]["5"]
    bank, queries = (
        F.normalize(torch.from_numpy(np.load(saved / f"{part}.cls.npy")), dim=1)
        for part in ("train", "val")
    )
    labels, truth = (np.load(saved / f"{part}.labels.npy") for part in ("train", "val"))
    right = 0
    for query, answer in zip(queries, truth, strict=True):
        similarity = (bank @ query).tolist()
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:5]
        votes = np.zeros(4)
        for i in nearest:
            votes[labels[i]] += np.exp(similarity[i] / 0.07)
        right += int(votes.argmax() == answer)
    assert found["top1"] == pytest.approx(100 * right / len(queries))
