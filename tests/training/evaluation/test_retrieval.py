"""The command line of retrieval, and its figures, on folders that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from backbone.artifact import read_artifact
from backbone.descriptors import multiscale
from tests.training.conftest import CPU, picture, write_pictures
from tests.training.evaluation.landmark_folder import write_landmarks
from tests.training.evaluation.tiny_model import write_tiny_model
from training.distributed import World
from training.evaluation import retrieval
from training.evaluation.__main__ import main
from training.evaluation.retrieval import leave_one_out, long_side_view, multiscale_embedder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    common = ["retrieval", "--device", "cpu", "--workers", "0", "--json"]
    assert main([*common, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["retrieval", "--device", "cpu", "--workers", "0", *arguments]) == 2
    return capsys.readouterr().err


def by_hand(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[float, dict[int, float]]:
    """Leave-one-out, one query at a time."""
    aps, recalls = [], {1: 0, 5: 0, 10: 0}
    for q in range(len(vectors)):
        others = [i for i in range(len(vectors)) if i != q]
        others.sort(key=lambda i: -float(vectors[q] @ vectors[i]))
        hits = [bool(labels[i] == labels[q]) for i in others]
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        aps.append(sum(precisions) / len(precisions))
        for k in recalls:
            recalls[k] += any(hits[:k])
    return sum(aps) / len(aps), {k: count / len(vectors) for k, count in recalls.items()}


@pytest.mark.parametrize("entries", [1, 100, 10**9])
def test_leave_one_out_by_hand(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(30, 6, generator=generator), dim=1)
    labels = torch.arange(30) % 4
    vectors += 0.5 * F.one_hot(labels, 6)
    monkeypatch.setattr(retrieval, "_ENTRIES", entries)
    value, recall = leave_one_out(vectors, labels, here=CPU)
    expected = by_hand(vectors, labels)
    assert value == pytest.approx(expected[0])
    assert recall == pytest.approx(expected[1])
    assert 0.3 < value < 1.0


def test_leave_one_out_is_shared_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    parts = [leave_one_out(vectors, labels, here=World(r, 3, CPU.device))[0] for r in range(3)]
    assert sum(parts) == pytest.approx(leave_one_out(vectors, labels, here=CPU)[0])


def test_leave_one_out_needs_two_of_each() -> None:
    with pytest.raises(ValueError, match="label 1 has one picture"):
        leave_one_out(torch.eye(3), torch.tensor([0, 1, 0]), here=CPU)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 40), (48, 19)), ((40, 100), (19, 48)), ((30, 20), (30, 20)), ((480, 20), (48, 16))],
)
def test_long_side(model: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    artifact = read_artifact(Path(model))
    view = long_side_view(artifact, long_side=48, smallest=16)
    whole = picture(1, size)
    seen = view(whole)
    assert seen.shape == (3, expected[1], expected[0])
    assert whole.size == size
    if size == (100, 40):
        shrunk = whole.copy()
        shrunk.thumbnail((48, 48), Image.Resampling.LANCZOS)
        assert torch.equal(seen, artifact.preprocess.to_tensor(shrunk))


def test_multiscale_embedder(model: str) -> None:
    artifact = read_artifact(Path(model))
    batch = torch.randn(1, 3, 24, 32)
    with torch.inference_mode():
        found = multiscale_embedder(artifact, CPU.device, precision="fp32")(batch)["cls"]
        assert torch.equal(found, multiscale(artifact.network(), batch))


def test_landmarks(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_landmarks(tmp_path / "roxford5k", "roxford5k")
    arguments = ["--model", model, "--data", str(tmp_path), "--image-size", "32"]
    result = found(capsys, *arguments, "--no-boxes", "--save", str(tmp_path / "out.json"))
    # Each query is a picture of the database, compressed otherwise.
    figures = result["retrieval"]["roxford5k"]
    assert [figures[each]["map"] for each in ("easy", "medium", "hard")] == [100.0] * 3
    assert figures["medium"]["mp_at"] == {"1": 100.0, "5": 40.0, "10": 20.0}
    assert figures["medium"]["mp_at_as_published"] == {"1": 100.0, "5": 100.0, "10": 100.0}
    assert figures["hard"]["aps"] == [100.0, 100.0]
    assert result["protocol"]["boxes"] is False
    assert result["data"]["roxford5k"]["database"]["pictures"] == 5
    assert result["fingerprint"] == read_artifact(Path(model)).fingerprint
    assert json.loads((tmp_path / "out.json").read_text()) == result

    boxed = found(capsys, *arguments, "--multiscale", "--dataset", "roxford5k")
    assert boxed["protocol"]["boxes"] is boxed["protocol"]["multiscale"] is True

    common = ["retrieval", *arguments, "--device", "cpu", "--workers", "0"]
    assert main(common) == 0
    table = capsys.readouterr().out
    assert "mP@10" in table
    assert "roxford5k  medium" in table


def test_labels(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in [("x", 0), ("y", 7)]:
        (tmp_path / name).mkdir()
        for i in range(3):
            picture(seed, (24 + i, 24)).save(tmp_path / name / f"{i}.png")
    result = found(capsys, "--model", model, "--labels", str(tmp_path), "--batch-size", "4")
    assert result["retrieval"]["labels"]["map"] == 100.0
    assert result["retrieval"]["labels"]["recall_at"] == {"1": 100.0, "5": 100.0, "10": 100.0}
    assert result["data"]["pictures"] == 6


def test_what_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "classes" / "many", 2)
    write_pictures(tmp_path / "classes" / "one", 1)
    labels = ["--model", model, "--labels", str(tmp_path / "classes")]
    told = error(capsys, *labels)
    assert "class 'one' in --labels has 1 picture ('one/000.png'); each class needs at" in told
    assert "belong to --data" in error(capsys, *labels, "--multiscale")
    assert "belong to --data" in error(capsys, *labels, "--image-size", "224")
    landmarks = ["--model", model, "--data", str(tmp_path)]
    assert "expected the published layout" in error(capsys, *landmarks)
    assert "needs 16 pixels" in error(capsys, *landmarks, "--image-size", "8", "--multiscale")


def test_a_corrupt_picture_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_landmarks(tmp_path, "roxford5k")
    (tmp_path / "jpg" / "b1.jpg").write_bytes(b"no picture")
    assert "'b1.jpg' cannot be read" in error(capsys, "--model", model, "--data", str(tmp_path))
