"""Video segmentation from the command line to the figures, on a small video in DAVIS's layout."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.preprocess import Preprocess
from tests.training.conftest import CPU, command, finish
from tests.training.evaluation.videos import SIZE, frame_picture, true_mask, write_davis
from training.config import ConfigError
from training.evaluation.__main__ import main
from training.evaluation.davis import open_davis, read_mask, write_mask
from training.evaluation.video_segmentation import measure, measure_all, view, view_size


def command_line(root: Path, *more: str) -> list[str]:
    given = ["--model", "default", "--device", "cpu", "--workers", "0", "--size", "96"]
    return ["video_segmentation", *given, "--data", str(root), *more]


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err[err.rindex("error: ") :]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_davis(tmp_path_factory.mktemp("davis"), "square")


def test_the_square_is_followed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved = tmp_path / "masks", tmp_path / "found.json"
    found = figures(capsys, *command_line(root, "--out", str(out)), "--save", str(saved))
    result = found["video_segmentation"]
    (sequence,) = open_davis(root)
    still = tmp_path / "still"
    still.mkdir()
    for path in sequence.annotations:
        shutil.copy(sequence.annotations[0], still / path.name)
    baseline = 100 * measure(sequence, still)[0].jaccard.mean
    assert baseline < 30
    assert result["j_mean"] > baseline + 40
    assert result["j_and_f_mean"] == pytest.approx((result["j_mean"] + result["f_mean"]) / 2)
    assert result["sequences"]["square"]["objects"]["1"]["j_mean"] == result["j_mean"]

    names = sorted(path.name for path in (out / "square").iterdir())
    assert names == [path.name for path in sequence.annotations]
    with Image.open(out / "square" / "00003.png") as picture:
        assert (picture.mode, picture.size) == ("P", SIZE)
    first = read_mask(out / "square" / "00000.png", size=SIZE)
    assert np.array_equal(first, true_mask(0))

    assert json.loads(saved.read_text()) == found
    assert found["protocol"] == {
        "size": 96, "last_frames": 7, "radius": 12, "topk": 5, "temperature": 0.1,
        "precision": "fp32",
    }  # fmt: skip
    assert found["data"]["pictures"] == 6
    assert len(found["fingerprint"]) == 16

    again = figures(capsys, *command_line(root, "--only-measure", str(out)))
    assert again["video_segmentation"] == result
    assert main(command_line(root, "--only-measure", str(out))) == 0
    table = capsys.readouterr().out
    assert f"{result['j_and_f_mean']:.2f}" in table.splitlines()[-1]


def test_batches_and_workers_change_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("a", ["--batch-size", "1"]), ("b", ["--batch-size", "5"])):
        workers = ["--workers", "1"] if name == "b" else []
        arguments = command_line(root, "--out", str(tmp_path / name), *more, *workers)
        assert main(arguments) == 0
    capsys.readouterr()
    for path in sorted((tmp_path / "a" / "square").iterdir()):
        one, other = (read_mask(tmp_path / n / "square" / path.name, size=SIZE) for n in "ab")
        assert (one == other).mean() > 0.999


def test_two_processes_share_the_sequences_and_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_davis(tmp_path / "davis", "one", "two", "three", frames=3)
    masks = root / "Annotations/480p/three"
    for path in masks.iterdir():
        write_mask(path, true_mask(int(path.stem)) * 2)  # objects 1, never seen, and 2
    alone = figures(capsys, *command_line(root, "--out", str(tmp_path / "alone")))
    launcher = command("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    arguments = command_line(root, "--out", str(tmp_path / "shared"), "--json")
    status, out, err = finish([*launcher, "training.evaluation", *arguments])
    assert status == 0, err
    together = json.loads(out)["video_segmentation"]
    expected = alone["video_segmentation"]
    assert list(together["sequences"]) == ["one", "two", "three"]
    assert together["sequences"]["three"]["objects"]["1"]["j_mean"] == 100.0
    assert together["sequences"]["three"]["objects"].keys() == {"1", "2"}
    assert together == expected


def test_true_masks_are_perfect_and_the_first_and_last_do_not_count(
    root: Path, tmp_path: Path
) -> None:
    sequences = open_davis(root)
    folder = tmp_path / "square"
    shutil.copytree(root / "Annotations/480p/square", folder)
    for name in ("00000.png", "00005.png"):
        (folder / name).unlink()
    (found,) = measure_all(sequences, tmp_path, here=CPU)["square"]
    assert found.jaccard == found.boundary_f == (1.0, 1.0, 0.0)
    # One of the four frames that count is lost, in the last quarter: 3 and 4 of the frames.
    write_mask(folder / "00004.png", true_mask(4) * 0)
    (found,) = measure_all(sequences, tmp_path, here=CPU)["square"]
    assert found.jaccard == found.boundary_f == (0.75, 0.75, 0.5)


def test_masks_that_cannot_be_measured(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "square"
    shutil.copytree(root / "Annotations/480p/square", folder)
    arguments = command_line(root, "--only-measure", str(tmp_path))
    write_mask(folder / "00002.png", true_mask(2) * 3)
    assert "00002.png' has object 3; square has 1" in error(capsys, *arguments)
    write_mask(folder / "00002.png", true_mask(2)[1:])
    assert "00002.png' is 128 x 95 pixels; expected 128 x 96" in error(capsys, *arguments)
    (folder / "00002.png").unlink()
    assert "00002.png' does not exist" in error(capsys, *arguments)


def test_a_frame_that_breaks_off_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_davis(tmp_path / "davis", "square", frames=3)
    path = root / "JPEGImages/480p/square/00001.jpg"
    path.write_bytes(path.read_bytes()[:1500])
    message = error(capsys, *command_line(root, "--out", str(tmp_path), "--workers", "1"))
    assert "square/00001.jpg' cannot be read" in message
    assert message.count("\n") == 1
    # Workers left over would be waited for at the interpreter's end, for a minute.
    assert multiprocessing.active_children() == []


def test_options_that_cannot_be(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command_line(root, "--out", str(tmp_path))
    assert "temperature is 0.0" in error(capsys, *arguments, "--temperature", "0")
    assert "--size 3 holds no patch of 8" in error(capsys, *arguments, "--size", "3")
    annotations = str(root / "Annotations/480p")
    assert "holds the annotations" in error(capsys, *command_line(root, "--out", annotations))
    assert "has no ImageSets" in error(
        capsys, *command_line(tmp_path, "--out", str(tmp_path / "out"))
    )
    with pytest.raises(SystemExit):
        main(command_line(root))
    assert "--out --only-measure is required" in capsys.readouterr().err


def test_a_network_without_patch_tokens(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "convnet.safetensors"
    architecture = Architecture(name="mobilenet_v3_small", image_size=32)
    write_artifact(
        Artifact(
            architecture=architecture,
            preprocess=Preprocess(resize=32, crop=32),
            weights=architecture.build().state_dict(),
        ),
        path,
    )
    arguments = command_line(root, "--out", str(tmp_path / "out"))
    message = error(capsys, *arguments, "--model", str(path))
    assert "mobilenet_v3_small, which has no patch tokens" in message


def test_sizes_at_which_frames_are_seen() -> None:
    assert view_size(854, 480, short_side=480, patch_size=8) == (832, 480)
    assert view_size(854, 480, short_side=480, patch_size=16) == (832, 480)
    assert view_size(480, 854, short_side=480, patch_size=16) == (480, 832)
    assert view_size(480, 480, short_side=480, patch_size=16) == (448, 480)
    assert view_size(910, 480, short_side=480, patch_size=8) == (896, 480)
    assert view_size(128, 96, short_side=32, patch_size=8) == (32, 32)
    assert view_size(1640, 100, short_side=480, patch_size=8) == (7872, 480)
    assert view_size(854, 480, short_side=480, patch_size=7) == (826, 476)
    with pytest.raises(ConfigError, match="--size 7 holds no patch of 8"):
        view_size(854, 480, short_side=7, patch_size=8)


def test_a_frame_is_resized_between_its_nearest_pixels() -> None:
    picture, preprocess = frame_picture(0), Preprocess()
    same = view(picture, preprocess, SIZE)
    torch.testing.assert_close(same, preprocess.to_tensor(picture))
    # Reduced fourfold each pixel lies between four: the second and third, across and down.
    pixels = np.asarray(picture, dtype=np.float32)
    middle = sum(pixels[i::4, j::4] for i in (1, 2) for j in (1, 2)) / 4
    reduced = view(picture, preprocess, (SIZE[0] // 4, SIZE[1] // 4))
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std)
    )
    found = (reduced * std + mean) * 255
    expected = torch.from_numpy(np.round(middle)).permute(2, 0, 1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
