"""What cannot be written is refused before anything is computed."""

from pathlib import Path

import pytest

from tests.training.conftest import write_pictures
from tests.training.evaluation.tiny_model import write_tiny_model
from training.config import ConfigError
from training.evaluation.__main__ import main
from training.evaluation.outputs import check_file, check_folder


def test_what_can_be_written_leaves_nothing_but_its_folder(tmp_path: Path) -> None:
    check_file("--save", tmp_path / "a" / "b.json")
    check_folder("--out", tmp_path / "c" / "d")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "c", "d"]
    kept = tmp_path / "a" / "b.json"
    kept.write_text("kept")
    check_file("--save", kept)
    assert kept.read_text() == "kept"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--save: .*file/x.json' cannot be written"):
        check_file("--save", tmp_path / "file" / "x.json")
    with pytest.raises(ConfigError, match="cannot be written: it is a folder"):
        check_file("--save", tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"--out: .* cannot be written"):
            check_folder("--out", folder)


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--save", ["retrieval", "--labels", "pictures"]),
        ("--save-examples", ["copy_detection", "--synthetic", "pictures"]),
        ("--save-examples", ["attention_jaccard", "--images", "pictures", "--masks", "pictures"]),
        ("--out", ["attention_video", "--input", "pictures"]),
        ("--out", ["report", "--synthetic-copies", "pictures"]),
    ],
)
def test_commands_say_so(
    option: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        write_pictures(tmp_path / "pictures" / name, 2)
    write_pictures(tmp_path / "pictures", 8)
    (tmp_path / "file").touch()
    command = [str(tmp_path / "pictures") if each == "pictures" else each for each in arguments]
    command += ["--model", write_tiny_model(tmp_path / "model.safetensors")]
    below = tmp_path / "file" / "x.png"
    assert main([*command, option, str(below)]) == 2
    assert f"error: {option}: '{below}' cannot be written" in capsys.readouterr().err
