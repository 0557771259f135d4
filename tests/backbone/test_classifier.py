import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from backbone.architectures import Architecture
from backbone.artifact import Artifact, ArtifactError
from backbone.classifier import (
    Classifier,
    descriptor_length,
    read_classifier,
    write_classifier,
)
from backbone.descriptors import describe


@pytest.fixture
def classifier(artifact: Artifact) -> Classifier:
    torch.manual_seed(1)
    return Classifier(
        weight=torch.randn(3, 2 * 192),
        bias=torch.randn(3),
        classes=("ant", "bée", "cat"),
        descriptor="cls+mean",
        fingerprint=artifact.fingerprint,
        preprocess=artifact.preprocess,
        base_lr=0.01,
        top1=62.5,
    )


def test_what_is_written_is_read(
    classifier: Classifier, artifact: Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "c.safetensors"
    write_classifier(classifier, path)
    found = read_classifier(path, artifact)
    for field in dataclasses.fields(Classifier):
        if field.name not in ("weight", "bias"):
            assert getattr(found, field.name) == getattr(classifier, field.name)
    features = describe(artifact.network(), torch.randn(2, 3, 16, 16), ["cls+mean"])["cls+mean"]
    layer = torch.nn.Linear(2 * 192, 3)
    layer.load_state_dict({"weight": classifier.weight, "bias": classifier.bias})
    torch.testing.assert_close(found(features), layer(features))
    assert [each.name for each in path.parent.iterdir()] == ["c.safetensors"]
    assert path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18"])
def test_a_descriptors_length_is_that_of_its_vectors(name: str) -> None:
    architecture = Architecture(name=name, patch_size=16, image_size=32)
    names = ["cls", "mean", "cls+mean", "copy", "last1", "block-1"]
    names += ["last4", "block-3"] if architecture.has_attention else []
    with torch.inference_mode():
        found = describe(architecture.build().eval(), torch.zeros(1, 3, 32, 32), names)
    for each, vectors in found.items():
        assert descriptor_length(architecture, each) == vectors.shape[1], each


def test_a_descriptor_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="descriptor 'last13': the network has 12 blocks"):
        descriptor_length(Architecture(name="vit_tiny"), "last13")
    with pytest.raises(ValueError, match="descriptor 'best' is none of"):
        descriptor_length(Architecture(name="vit_tiny"), "best")


def test_another_models_classifier_is_refused(
    classifier: Classifier, artifact: Artifact, tmp_path: Path
) -> None:
    write_classifier(classifier, tmp_path / "c.safetensors")
    weights = {**artifact.weights, "cls_token": artifact.weights["cls_token"] + 1}
    other = dataclasses.replace(artifact, weights=weights)
    with pytest.raises(ArtifactError, match=f"this model's is '{other.fingerprint}'"):
        read_classifier(tmp_path / "c.safetensors", other)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight", torch.zeros(2, 384), r"weight in .* \[2, 384\], not float32 \[3, 384\]"),
        ("bias", torch.tensor([0.0, 0.0, torch.nan]), "bias in .* not finite"),
        ("bias", torch.zeros(3).half(), "bias in .* is torch.float16"),
    ],
)
def test_what_cannot_be_is_not_written(
    classifier: Classifier, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(ArtifactError, match=message):
        write_classifier(dataclasses.replace(classifier, **{field: value}), path)
    assert not path.exists()


def tampered(path: Path, **changes: Any) -> None:
    """Writes the file again, with other tensors, or other fields of its header (None: without)."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dinoscope_classifier"])
        tensors = {name: file.get_tensor(name) for name in ("weight", "bias")}
    for name, value in changes.items():
        place = tensors if name in ("weight", "bias", "more") else header
        if value is None:
            del place[name]
        else:
            place[name] = value
    save_file(tensors, path, metadata={"dinoscope_classifier": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; this program reads 1"),
        ({"classes": None}, r"has \['base_lr', .*\], not"),
        ({"classes": ["a", "a", "b"]}, "classes cannot be"),
        ({"classes": ["a", "b"]}, r"weight in .* not float32 \[2, 384\]"),
        ({"classes": "abc"}, "classes cannot be 'abc'"),
        ({"base_lr": float("nan")}, "base_lr cannot be nan"),
        ({"top1": True}, "top1 cannot be True"),
        ({"descriptor": "cls"}, r"weight in .* \[3, 384\], not float32 \[3, 192\]"),
        ({"descriptor": "last13"}, "the network has 12 blocks"),
        ({"preprocessing": {"resize": 18}}, "missing fields"),
        ({"bias": None}, r"holds \['weight'\], not"),
        ({"more": torch.zeros(1)}, r"holds \['bias', 'more', 'weight'\], not"),
        ({"weight": torch.full((3, 384), torch.inf)}, "not finite"),
    ],
)
def test_a_file_that_contradicts_itself(
    classifier: Classifier,
    artifact: Artifact,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    path = tmp_path / "c.safetensors"
    write_classifier(classifier, path)
    tampered(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        read_classifier(path, artifact)


def test_other_preprocessing_than_the_models(
    classifier: Classifier, artifact: Artifact, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    other = dataclasses.replace(artifact.preprocess, resize=20)
    write_classifier(dataclasses.replace(classifier, preprocess=other), path)
    with pytest.raises(ArtifactError, match="preprocessing is not the model's"):
        read_classifier(path, artifact)


def test_a_file_that_is_none(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(ArtifactError, match="does not exist"):
        read_classifier(path, artifact)
    path.write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        read_classifier(path, artifact)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="has no 'dinoscope_classifier' entry"):
        read_classifier(path, artifact)
