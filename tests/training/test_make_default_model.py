import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone.artifact import read_artifact
from training.make_default_model import main

RECIPE = """
epochs = 1
batch_size = 100
device = "cpu"
[data]
workers = 0
[model]
architecture = "vit_tiny"
patch_size = 8
[head]
out_dim = 16
hidden_dim = 16
[crops]
global_size = 16
local_count = 0
[optimizer]
warmup_epochs = 0
"""


def write_tar(path: Path, pictures: int, *, seed: int) -> None:
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w:gz") as tar:
        for i in range(pictures):
            colour = np.array([250, 30, 30] if i % 2 else [30, 30, 250])
            pixels = (colour + random.integers(-25, 25, (16, 16, 3))).clip(0, 255)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            entry = tarfile.TarInfo(f"part/{'red' if i % 2 else 'blue'}/{i}.png")
            entry.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(entry, buffer)


def test_one_command_makes_measures_and_places_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for part in range(2):
        write_tar(tmp_path / f"tiny-imagenet-train-{part}.tar.gz", 200, seed=part)
    write_tar(tmp_path / "tiny-imagenet-val.tar.gz", 10, seed=9)
    out = tmp_path / "model.safetensors"
    command = [str(tmp_path / "recipe.toml"), "--data", str(tmp_path), "--out", str(out)]
    command += ["--run-dir", str(tmp_path / "run"), "--input", "16", "--k", "5"]
    assert main(command) == 0

    artifact = read_artifact(out)
    assert artifact.whitening is not None
    assert artifact.preprocess.crop == 16
    measured = artifact.quality["measured"]
    assert set(measured) == {"model", "untrained", "pixels"}
    assert measured["pixels"]["top1"] == 100.0  # red and blue
    assert json.loads(out.with_suffix(".quality.json").read_text()) == artifact.quality
    assert str(tmp_path) not in json.dumps(artifact.provenance)
    assert "k-NN top-1" in capsys.readouterr().out

    assert main([*command[:1], "--data", str(tmp_path / "nowhere"), *command[3:]]) == 2
    told = capsys.readouterr().err
    assert f"--data {tmp_path / 'nowhere'}: must be a folder with tiny-imagenet-train-*" in told
