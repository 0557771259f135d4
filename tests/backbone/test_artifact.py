import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from backbone.artifact import Artifact, ArtifactError, read_artifact, write_artifact
from backbone.preprocess import Preprocess
from tests.backbone.conftest import ARCHITECTURE, PREPROCESS

HEADER: dict[str, Any] = {
    "format_version": 1,
    "architecture": asdict(ARCHITECTURE),
    "preprocessing": asdict(PREPROCESS),
    "provenance": {},
    "quality": {},
}


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_round_trip(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "models" / "m.safetensors"
    fingerprint = write_artifact(artifact, path)
    read = read_artifact(path)
    assert replace(read, weights={}) == replace(artifact, weights={})
    torch.testing.assert_close(dict(read.weights), dict(artifact.weights), rtol=0, atol=0)
    assert read.fingerprint == fingerprint
    assert len(fingerprint) == 16
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_others_may_read_the_file(artifact: Artifact, tmp_path: Path) -> None:
    write_artifact(artifact, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_network_is_ready_to_use(artifact: Artifact) -> None:
    network = artifact.network()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    built = ARCHITECTURE.build().eval()
    built.load_state_dict(dict(artifact.weights))
    pictures = torch.randn(2, 3, 16, 24)
    assert torch.equal(network(pictures).cls, built(pictures).cls)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_are_stored_as_such(
    artifact: Artifact, tmp_path: Path, dtype: torch.dtype
) -> None:
    half = {name: w.to(dtype) for name, w in artifact.weights.items()}
    write_artifact(replace(artifact, weights=half), tmp_path / "m.safetensors")
    read = read_artifact(tmp_path / "m.safetensors")
    assert {w.dtype for w in read.weights.values()} == {dtype}
    assert {p.dtype for p in read.network().parameters()} == {torch.float32}


def test_the_fingerprint_is_of_the_content(artifact: Artifact, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    other = {**artifact.weights, "norm.bias": artifact.weights["norm.bias"] + 1}
    changed = replace(artifact, weights=other)
    first, again, third = map(write_artifact, (artifact, artifact, changed), paths)
    assert first == again != third


def test_a_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "m.safetensors")
    assert "does not exist" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model", b"\xff" * 100, bytes(64)])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert "not a readable safetensors file" in refusal(path)


@pytest.mark.parametrize("share", [0.00001, 0.001, 0.5, 0.999999])
def test_truncated(artifact: Artifact, tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.safetensors"
    write_artifact(artifact, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "not a readable safetensors file" in refusal(path)


def test_a_file_of_another_program(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(weights, path)
    assert "no 'dinoscope' entry" in refusal(path)
    save_file(weights, path, metadata={"format": "pt"})
    assert "no 'dinoscope' entry" in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_a_header_that_is_no_object(weights: dict[str, Tensor], tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file(weights, path, metadata={"dinoscope": text})
    assert "JSON" in refusal(path)


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.pop(key)


def changed(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[section].update(values)


DEFECTS = {
    "version 2": (lambda h: h.update(format_version=2), ["format version 2", "reads 1"]),
    "no version": (without("format_version"), ["format version None"]),
    "no architecture": (without("architecture"), ["no object 'architecture'"]),
    "no preprocessing": (without("preprocessing"), ["no object 'preprocessing'"]),
    "provenance a list": (lambda h: h.update(provenance=[]), ["no object 'provenance'"]),
    "no quality": (without("quality"), ["no object 'quality'"]),
    "unknown network": (
        changed("architecture", name="vit_tinny"),
        ["'vit_tinny'", "did you mean 'vit_tiny'"],
    ),
    "name a number": (changed("architecture", name=5), ["header"]),
    "name a list": (changed("architecture", name=[]), ["header"]),
    "extra field": (changed("architecture", depth=3), ["depth", "patch_size"]),
    "missing field": (lambda h: h["architecture"].pop("patch_size"), ["patch_size"]),
    "patch 0": (changed("architecture", patch_size=0), ["patch_size is 0"]),
    "patch a string": (changed("architecture", patch_size="8"), ["patch_size is '8'"]),
    "no patch fits": (changed("architecture", patch_size=17), ["smaller than patch_size 17"]),
    "a gigantic network": (changed("architecture", image_size=8 * 10**12), ["image_size"]),
    "a picture of other channels": (changed("architecture", in_channels=1), ["3 channels", "1"]),
    "channels": (
        changed("preprocessing", mean=[0.5], std=[0.5]),
        ["preprocessing has 1 channels", "architecture 3"],
    ),
    "mean and std": (changed("preprocessing", mean=[0.5]), ["mean has 1 channels and std 3"]),
    "std 0": (changed("preprocessing", std=[0.2, 0.0, 0.2]), ["std"]),
    "mean NaN": (changed("preprocessing", mean=[0.2, float("nan"), 0.2]), ["mean"]),
    "mean a string": (changed("preprocessing", mean="abc"), ["mean is 'abc'"]),
    "no mean": (lambda h: h["preprocessing"].pop("mean"), ["missing fields ['mean']"]),
    "unknown preprocessing": (changed("preprocessing", gamma=2), ["unknown fields ['gamma']"]),
    "crop above resize": (changed("preprocessing", crop=64), ["crop 64 is larger than resize 18"]),
    "crop holds no patch": (changed("preprocessing", crop=7), ["crop 7", "patch_size 8"]),
    "resize a float": (changed("preprocessing", resize=18.5), ["resize is 18.5"]),
    "copy_size 0": (changed("preprocessing", copy_size=0), ["copy_size is 0"]),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_header_that_cannot_be(weights: dict[str, Tensor], tmp_path: Path, defect: str) -> None:
    change, words = DEFECTS[defect]
    header = json.loads(json.dumps(HEADER))
    change(header)
    path = tmp_path / "m.safetensors"
    save_file(weights, path, metadata={"dinoscope": json.dumps(header)})
    said = refusal(path)
    assert all(word in said for word in words), said


def test_the_header_of_these_tests_is_sound(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(weights, path, metadata={"dinoscope": json.dumps(HEADER)})
    assert read_artifact(path).architecture == ARCHITECTURE


BIAS = "blocks.3.mlp.fc1.bias"


def spoiled(weights: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    bias = weights[BIAS].clone()
    bias[5] = value
    return {**weights, BIAS: bias}


WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], list[str]]] = {
    "missing": (
        lambda w: {k: v for k, v in w.items() if k != BIAS},
        [f"missing ['{BIAS}']", "vit_tiny"],
    ),
    "many missing": (lambda w: {"norm.bias": w["norm.bias"]}, ["missing", "and 146 more"]),
    "unknown": (lambda w: {**w, "head.weight": torch.ones(3)}, ["unknown ['head.weight']"]),
    "misshaped": (
        lambda w: {**w, BIAS: torch.zeros(7)},
        [BIAS, "has shape [7], not [768]"],
    ),
    "positions of another size": (
        lambda w: {**w, "pos_embed": torch.zeros(1, 10, 192)},
        ["pos_embed", "[1, 10, 192]", "[1, 5, 192]"],
    ),
    "NaN": (lambda w: spoiled(w, float("nan")), [BIAS, "not finite"]),
    "infinite": (lambda w: spoiled(w, float("-inf")), [BIAS, "not finite"]),
    "whole numbers": (lambda w: {**w, BIAS: torch.zeros(768, dtype=torch.int64)}, [BIAS, "int64"]),
}


@pytest.mark.parametrize("defect", WEIGHTS)
def test_weights_that_do_not_fit(artifact: Artifact, tmp_path: Path, defect: str) -> None:
    change, words = WEIGHTS[defect]
    weights = change(dict(artifact.weights))
    path = tmp_path / "m.safetensors"
    save_file(weights, path, metadata={"dinoscope": json.dumps(HEADER)})
    said = refusal(path)
    assert all(word in said for word in words), said

    path.unlink()
    with pytest.raises(ArtifactError, match=r"m\.safetensors"):
        write_artifact(replace(artifact, weights=weights), path)
    assert not list(tmp_path.iterdir())


def test_preprocessing_that_does_not_fit_is_not_written(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    grey = Preprocess(resize=18, crop=16, copy_size=24, mean=(0.5,), std=(0.5,))
    for wrong, words in ((grey, "1 channels"), (replace(PREPROCESS, crop=7), "crop 7")):
        with pytest.raises(ArtifactError, match=words):
            write_artifact(replace(artifact, preprocess=wrong), path)
    assert not list(tmp_path.iterdir())
