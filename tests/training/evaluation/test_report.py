import base64
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.training.conftest import finish, picture
from tests.training.evaluation.test_attention_jaccard import SIZES, box, write_model, write_pairs
from tests.training.test_report import Page
from training.evaluation import knn
from training.evaluation.__main__ import main

OPTIONS = ["--options", "knn=--k 1 3", "attention_jaccard=--mass 0.6 0.8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, three classes that pixels tell apart, and pictures with masks."""
    folder = tmp_path_factory.mktemp("report")
    write_model(folder / "tiny.safetensors")
    for i in range(12):
        for part in ("train", "val")[i % 2 :: 2]:
            path = folder / part / f"<{'abc'[i // 4]}>" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i // 4).rotate(i % 4).save(path)
    write_pairs(folder)
    return folder


def command_line(folder: Path, *more: str, labelled: bool = True, pairs: bool = True) -> list[str]:
    arguments = ["report", "--model", str(folder / "tiny.safetensors"), "--device", "cpu"]
    arguments += ["--workers", "0"]
    if labelled:
        arguments += ["--train", str(folder / "train"), "--val", str(folder / "val")]
    if pairs:
        arguments += ["--images", str(folder / "images"), "--masks", str(folder / "masks")]
    return [*arguments, *more]


def chosen(*names: str) -> list[str]:
    return ["--evaluations", *names]


def jpegs(page: Page) -> list[Image.Image]:
    head = "data:image/jpeg;base64,"
    found = [src.removeprefix(head) for src in page.pictures if src.startswith(head)]
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def figures(path: Path) -> dict[str, Any]:
    """What a command saved, but for the command line and time."""
    found: dict[str, Any] = json.loads(path.read_text())
    del found["environment"]
    return found


def test_one_page_with_everything(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--queries", "4", "--pictures", "9", *OPTIONS]
    asked = chosen("knn", "attention_jaccard")
    assert main(command_line(folder, *arguments, *asked)) == 0
    out = capsys.readouterr().out
    page = Page(tmp_path / "out" / "report.html")
    assert page.fetched == []
    assert out.splitlines()[-1] == str(tmp_path / "out" / "report.html")

    # Every figure is what the command alone gives, and so is its table.
    shared = ["--model", str(folder / "tiny.safetensors"), "--device", "cpu", "--workers", "0"]
    data = {
        "knn": ["--train", str(folder / "train"), "--val", str(folder / "val"), "--k", "1", "3"],
        "attention_jaccard": [
            *("--images", str(folder / "images"), "--masks", str(folder / "masks")),
            *("--mass", "0.6", "0.8"),
        ],
    }
    for name, own in data.items():
        assert main([name, *shared, *own, "--save", str(tmp_path / "alone.json")]) == 0
        table = capsys.readouterr().out.rstrip()
        assert table in out
        assert " ".join(table.split()) in page.text
        assert figures(tmp_path / "alone.json") == figures(tmp_path / "out" / f"{name}.json")
    found = figures(tmp_path / "out" / "knn.json")
    for words in ("tiny: evaluations", "vit_tiny", found["fingerprint"], "names_sha256"):
        assert words in page.text

    # Attention: 5 pictures (there are no 9) with 3 heads and their mean; neighbours: 4 x (1 + 5).
    assert len(jpegs(page)) == 5 * (1 + 1 + 3) + 4 * (1 + 5)
    assert [tile.size for tile in jpegs(page)[:15:5]] == [(150, 112), (150, 112), (112, 150)]
    assert page.classes.count("right") + page.classes.count("wrong") == 4 * (1 + 5)
    assert page.classes.count("right") >= 4
    assert "k = 6:" in page.text  # 20, or all there are
    assert "<a>" in page.text


def test_pictures_of_three_classes_confuse_few(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against `knn` itself: the same pictures, the same k."""
    more = ["--out", str(tmp_path), "--options", "knn=--k 6", "--json", *chosen("knn")]
    assert main(command_line(folder, *more, pairs=False)) == 0
    found = json.loads(capsys.readouterr().out)
    top1 = found["evaluations"]["knn"]["knn"]["6"]["top1"]
    assert f"k = 6: {top1:.2f} % of 6 right" in Page(tmp_path / "report.html").text
    assert (found["evaluation"], found["failed"]) == ("report", [])
    assert found["page"] == str(tmp_path / "report.html")


def test_what_fails_is_said_and_the_others_stand(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = ["--out", str(tmp_path), "--json", *chosen("knn", "attention_jaccard")]
    for options, words in (
        ("knn=--k 200", "knn: --k 200: --train holds 6 pictures"),
        ("knn=--nonsense 1", "knn: this command line is refused: knn --model "),
    ):
        assert main(command_line(folder, *more, "--options", options)) == 1
        out, err = capsys.readouterr()
        assert f"error: {words}" in err
        found = json.loads(out)
        assert found["failed"] == ["knn"]
        assert found["evaluations"]["knn"]["error"].startswith(words.removeprefix("knn: "))
        assert "jaccard_mean" in found["evaluations"]["attention_jaccard"]
        page = Page(tmp_path / "report.html")
        assert words.replace("knn:", "knn failed:") in page.text
        assert "attention Jaccard of 4 pictures" in page.text
        assert page.classes.count("bad") == 1

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory <1>")

    monkeypatch.setattr(knn, "compare", breaks)
    assert main(command_line(folder, *more, "--options", "knn=--k 1")) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert json.loads(out)["evaluations"]["knn"]["error"] == "RuntimeError: out of memory <1>"
    assert "RuntimeError: out of memory <1>" in Page(tmp_path / "report.html").text
    assert not (tmp_path / "knn.json").exists()  # that of an earlier report does not stay


def test_a_convnet_has_no_attention_and_still_neighbours(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "convnet.safetensors", "resnet18")
    more = ["--out", str(tmp_path), *OPTIONS, *chosen("knn", "attention_jaccard")]
    arguments = command_line(folder, *more)
    arguments[arguments.index("--model") + 1] = str(tmp_path / "convnet.safetensors")
    assert main(arguments) == 1
    assert "attention_jaccard: model" in capsys.readouterr().err
    page = Page(tmp_path / "report.html")
    assert "No attention maps: they need pictures, and a ViT." in page.text
    assert "k-NN of 6 pictures" in page.text


def test_a_folder_with_masks_in_it_shows_its_pictures_alone(folder: Path, tmp_path: Path) -> None:
    voc = tmp_path / "VOC2012"
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("0\n1\n")
    shutil.copytree(folder / "images", voc / "JPEGImages")
    (voc / "SegmentationClass").mkdir()
    for i, size in enumerate(SIZES):
        box(*size, value=15).save(voc / "SegmentationClass" / f"{i}.png")
    arguments = ["--out", str(tmp_path / "out"), "--voc", str(voc)]
    assert main(command_line(folder, *arguments, labelled=False, pairs=False)) == 0
    page = Page(tmp_path / "out" / "report.html")
    assert len(jpegs(page)) == 5 * (1 + 1 + 3)
    assert "No neighbours" in page.text
    assert (tmp_path / "out" / "attention_jaccard_voc.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "no data is given: --train, --val"),
        (["--train", "x"], "--train is given without --val"),
        (["--masks", "x"], "--masks is given without --images"),
        (["--evaluations", "knn"], "--evaluations knn: needs --train and --val"),
        (
            ["--evaluations", "attention_jaccard"],
            "attention_jaccard: needs --images and --masks, or --voc",
        ),
        (["--voc", "x", "--options", "nonsense=1"], "--options 'nonsense=1': must be NAME="),
        (["--voc", "x", "--options", "knn='"], "No closing quotation"),
        (["--voc", "x", "--model", "nothing"], "'nothing' is neither a file nor one of"),
    ],
)
def test_options_that_make_no_sense(
    folder: Path, tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command_line(folder, "--out", str(out), *more, labelled=False, pairs=False)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_two_processes_find_the_same_and_make_the_same_page(folder: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node=2", "-m", "training.evaluation"]
    asked = [*OPTIONS, *chosen("knn", "attention_jaccard")]
    several = command_line(folder, "--out", str(tmp_path / "two"), *asked)
    status, out, err = finish([*launcher, *several])
    assert status == 0, err
    assert out.count("k-NN of 6 pictures") == 1  # one process speaks
    assert out.splitlines()[-1] == str(tmp_path / "two" / "report.html")
    assert main(command_line(folder, "--out", str(tmp_path / "one"), *asked)) == 0
    two, one = (Page(tmp_path / name / "report.html") for name in ("two", "one"))
    assert two.classes == one.classes
    assert len(two.pictures) == len(one.pictures)
    scores = ("jaccard_best_head", "jaccard_mean", "jaccard_of_mean_map", "jaccard_per_head")
    several, single = (
        figures(tmp_path / name / "attention_jaccard.json") for name in ("two", "one")
    )
    for key in scores:
        assert several[key] == pytest.approx(single[key], abs=1e-9)
    assert several["data"] == single["data"]
    assert figures(tmp_path / "two" / "knn.json") == figures(tmp_path / "one" / "knn.json")
