"""Copydays' layout, the search, whitening, and the command line, on pictures that are made up."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.training.conftest import command, finish, picture, write_pictures
from tests.training.evaluation.landmark_folder import write_landmarks
from tests.training.evaluation.tiny_model import write_tiny_model
from training.evaluation.__main__ import main
from training.evaluation.copy_search import STRANGER, CopyBenchmark, copy_figures
from training.evaluation.copy_whitening import Moments
from training.evaluation.copydays import open_copydays
from training.evaluation.nearest import Neighbours
from training.sources import DataError, FolderPictures, open_pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return write_tiny_model(path, whitened=True)


@pytest.fixture
def copydays(tmp_path: Path) -> Path:
    """Three originals; strong copies of two, crops and JPEGs of all."""
    folder = tmp_path / "copydays"
    for block in ("original", "strong", "crops/50", "crops/8", "jpeg/75"):
        (folder / block).mkdir(parents=True)
    for number in range(3):
        name, whole = f"200{number}", picture(number, (48, 40))
        whole.save(folder / "original" / f"{name}00.jpg")
        whole.save(folder / "jpeg" / "75" / f"{name}00.jpg", quality=75)
        for percent in (50, 8):
            inside = whole.crop((2, 2, 46, 38))
            inside.save(folder / "crops" / str(percent) / f"{name}00.jpg")
    for name, number in [("200001", 0), ("200002", 0), ("200201", 2)]:
        picture(number, (48, 40)).rotate(90).save(folder / "strong" / f"{name}.jpg")
    return folder


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    common = ["copy_detection", "--device", "cpu", "--workers", "0", "--json"]
    assert main([*common, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["copy_detection", "--device", "cpu", "--workers", "0", *arguments]) == 2
    return capsys.readouterr().err


def test_copydays_by_the_first_four_characters(copydays: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "others", 2)
    benchmark = open_copydays(copydays, [str(tmp_path / "others")])
    assert list(benchmark.blocks) == ["strong", "crops/8", "crops/50", "jpeg/75"]
    assert benchmark.blocks["crops/8"] == range(3, 6)
    assert benchmark.query_groups.tolist() == [0, 0, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert benchmark.database_groups.tolist() == [0, 1, 2, STRANGER, STRANGER]
    assert benchmark.queries.names[2:4] == ["200201.jpg", "200000.jpg"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "original").rename(f / "originals"), r"original' is not there; expected"),
        (
            lambda f: picture(1).save(f / "strong" / "999901.jpg"),
            r"strong/999901.jpg .* has no original: no name in original/ begins with '9999'",
        ),
        (lambda f: (f / "crops" / "50").rename(f / "crops" / "half"), "'half', which is no number"),
        (lambda f: (f / "jpeg" / "3").mkdir(), "jpeg/3' holds no picture"),
    ],
)
def test_another_layout(copydays: Path, spoil: Any, message: str) -> None:
    spoil(copydays)
    with pytest.raises(DataError, match=message):
        open_copydays(copydays)


def test_originals_alone(copydays: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (copydays / "original").rename(tmp_path / "empty" / "original")
    with pytest.raises(DataError, match="holds no copies; expected Copydays' layout"):
        open_copydays(tmp_path / "empty")


def test_figures_by_hand(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    pictures = FolderPictures(tmp_path)
    benchmark = CopyBenchmark(
        queries=pictures,
        query_groups=torch.tensor([0, 1, STRANGER, STRANGER]),
        blocks={"easy": range(2), "none": range(2, 4)},
        database=pictures,
        database_groups=torch.tensor([0, 1, 0, STRANGER]),
    )
    neighbours = Neighbours(
        similarity=torch.tensor([[0.9, 0.8], [0.6, 0.5], [0.7, 0.1], [0.3, 0.2]]),
        # A stranger and a distractor have the same group, and are no match.
        places=torch.tensor([[0, 2], [3, 1], [3, 0], [3, 1]]),
    )
    found = copy_figures(benchmark, neighbours)
    easy = found["blocks"]["easy"]
    assert easy["queries"] == 2
    assert easy["map"] == pytest.approx(100 * (1 + 0.25) / 2)
    assert easy["recall_at_1"] == pytest.approx(50)
    # By score within the block: right, right, wrong, right; over all, a false alarm before those.
    assert easy["micro_ap"] == pytest.approx(100 * (1 + 1 + 3 / 4) / 3)
    assert found["micro_ap"] == pytest.approx(100 * (1 + 1 + 3 / 5) / 3)
    assert found["blocks"]["none"] == {
        "queries": 2,
        "map": None,
        "recall_at_1": None,
        "micro_ap": None,
    }


def test_streamed_whitening_is_that_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 3
    moments = Moments(5, torch.device("cpu"))
    for batch in vectors.split(17):
        moments.add(batch)
    whitening = moments.whitening(centred=True)
    white = (vectors - vectors.mean(dim=0)) @ whitening.matrix
    torch.testing.assert_close(white.T @ white / 200, torch.eye(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitening(vectors), F.normalize(white, dim=1), atol=1e-5, rtol=0)


def test_whitening_of_too_few() -> None:
    moments = Moments(3, torch.device("cpu"))
    moments.add(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 vectors, not 1"):
        moments.whitening(centred=True)


def test_copydays_command(
    model: str, copydays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "others", 6)
    arguments = ["--model", model, "--data", str(copydays), "--size", "32", "--batch-size", "5"]
    whitening = ["--whitening", str(tmp_path / "others")]
    result = found(capsys, *arguments, *whitening, "--distractors", str(tmp_path / "others"))
    figures = result["copy_detection"]
    assert list(figures) == ["none", "original", "centred"]
    assert list(figures["none"]["blocks"]) == ["strong", "crops/8", "crops/50", "jpeg/75"]
    jpeg = figures["none"]["blocks"]["jpeg/75"]
    assert (jpeg["queries"], jpeg["map"], jpeg["recall_at_1"]) == (3, 100.0, 100.0)
    assert 0 < figures["original"]["micro_ap"] <= 100
    assert result["protocol"]["size"] == 32
    assert result["protocol"]["descriptor"] == "copy"
    assert result["data"]["database"]["pictures"] == 9
    assert result["data"]["whitening"]["pictures"] == 6

    common = ["copy_detection", *arguments, "--device", "cpu", "--workers", "0"]
    assert main([*common, *whitening]) == 0
    out, told = capsys.readouterr()
    assert "crops/50" in out
    assert "warning: --whitening holds 6 pictures for 384 dimensions" in told

    result = found(capsys, "--model", model, "--data", str(copydays), "--descriptor", "cls")
    assert list(result["copy_detection"]) == ["none", "artifact"]


def test_what_is_refused(
    model: str, copydays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "few", 7)
    write_pictures(tmp_path / "one", 1)
    data = ["--model", model, "--data", str(copydays)]
    few = ["--model", model, "--synthetic", str(tmp_path / "few")]
    assert "--save-examples belongs to --synthetic" in error(capsys, *data, "--save-examples", "x")
    assert "--seed belongs to --synthetic" in error(capsys, *data, "--seed", "0")
    assert "--size belongs" in error(capsys, *data, "--size", "32", "--descriptor", "cls")
    assert "--size 4 is smaller than patch_size 8" in error(capsys, *data, "--size", "4")
    assert "at least 2" in error(capsys, *data, "--whitening", str(tmp_path / "one"))
    assert "7 pictures with 4 copied originals" in error(capsys, *few)
    assert "--distractors belongs to --data" in error(capsys, *few, "--distractors", "x")
    (copydays / "strong" / "200201.jpg").write_bytes(b"no picture")
    assert "'200201.jpg' cannot be read" in error(capsys, *data)


def test_synthetic_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "pictures", 9)
    arguments = ["--model", model, "--synthetic", str(tmp_path / "pictures"), "--count", "4"]
    sheet = tmp_path / "sheets" / "sheet.png"
    result = found(capsys, *arguments, "--save-examples", str(sheet))
    blocks = result["copy_detection"]["none"]["blocks"]
    assert blocks["jpeg-75"]["queries"] == 8
    assert blocks["jpeg-75"]["recall_at_1"] == 100.0
    assert (result["protocol"]["seed"], result["data"]["database"]["pictures"]) == (0, 5)
    with Image.open(sheet) as shown:
        assert shown.width > 600


def test_two_processes_give_the_figures_of_one(
    model: str, copydays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copy detection and both kinds of retrieval, in one start of two processes."""
    others, common = str(tmp_path / "others"), ["--model", model, "--device", "cpu", "--json"]
    write_pictures(tmp_path / "others", 7)
    write_landmarks(tmp_path / "roxford5k", "roxford5k")
    for i in range(5):
        write_pictures(tmp_path / "classes" / str(i), 2 + i % 2)
    common += ["--workers", "0"]
    whitening = ["--whitening", others, "--kept", "4"]
    lines = [
        ["copy_detection", *common, "--data", str(copydays), "--distractors", others, *whitening],
        ["retrieval", *common, "--data", str(tmp_path), "--image-size", "32"],
        ["retrieval", *common, "--labels", str(tmp_path / "classes")],
    ]
    assert [main(line) for line in lines] == [0, 0, 0]
    alone = capsys.readouterr().out.splitlines()
    status, out, err = finish(
        [
            *command("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"),
            *("tests.training.evaluation.several_commands", *map(json.dumps, lines)),
        ]
    )
    assert status == 0, err
    together = out.splitlines()
    assert len(together) == len(alone) == 3
    for one, other in zip(map(json.loads, alone), map(json.loads, together), strict=True):
        assert other["environment"]["processes"] == 2
        name = one["evaluation"]
        assert dict(flat(other[name])) == pytest.approx(dict(flat(one[name])))


def flat(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested tables and lists, and where they stand."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(each, f"{where}/{key}")
    else:
        yield where, value


def test_folders_are_read_as_they_are(copydays: Path) -> None:
    benchmark = open_copydays(copydays)
    strong = open_pictures([copydays / "strong"])
    assert benchmark.queries.read(2) == strong.read(2)
