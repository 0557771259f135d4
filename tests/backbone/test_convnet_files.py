"""Convolutional networks as files: artifacts, in half precision too, and original checkpoints."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from backbone import pretrained
from backbone.architectures import Architecture
from backbone.artifact import (
    Artifact,
    ArtifactError,
    half_precision,
    read_artifact,
    write_artifact,
)
from backbone.preprocess import Preprocess
from backbone.pretrained import DEFAULT_MODEL, load_model, read_checkpoint, read_tensors

RESNET50 = Architecture(name="resnet50")
SMALL = Architecture(name="mobilenet_v3_small", image_size=32)
COUNT = "features.0.1.num_batches_tracked"
VARIANCE = "features.0.1.running_var"


def trained(architecture: Architecture) -> dict[str, Tensor]:
    """Weights whose BatchNorms have seen something."""
    torch.manual_seed(0)
    network = architecture.build().train()
    with torch.no_grad():
        for _ in range(3):
            network(2 + 3 * torch.randn(4, architecture.in_channels, 64, 64))
    weights: dict[str, Tensor] = network.state_dict()
    return weights


@pytest.fixture(scope="module")
def resnet50() -> dict[str, Tensor]:
    return trained(RESNET50)


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    return trained(SMALL)


def artifact_of(architecture: Architecture, weights: dict[str, Tensor]) -> Artifact:
    side = architecture.image_size
    preprocess = Preprocess.in_proportion(side, patch_size=architecture.patch_size)
    return Artifact(architecture=architecture, preprocess=preprocess, weights=weights)


def same(found: Artifact, weights: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(found.weights), weights, rtol=0, atol=0)


def test_an_artifact_keeps_the_batch_norms_statistics(
    small: dict[str, Tensor], tmp_path: Path
) -> None:
    artifact = artifact_of(SMALL, small)
    fingerprint = write_artifact(artifact, tmp_path / "m.safetensors")
    read = read_artifact(tmp_path / "m.safetensors")
    same(read, small)
    assert (read.fingerprint, read.architecture) == (fingerprint, SMALL)
    assert int(read.weights[COUNT]) == 3
    built = SMALL.build().eval()
    built.load_state_dict(small)
    network, pictures = read.network(), torch.randn(2, 3, 32, 40)
    assert torch.equal(network(pictures).cls, built(pictures).cls)
    assert int(network.state_dict()[COUNT]) == 3


def test_the_fingerprint_is_of_what_decides_on_vectors(small: dict[str, Tensor]) -> None:
    before = artifact_of(SMALL, small).fingerprint
    counted = {**small, COUNT: small[COUNT] + 1}
    assert artifact_of(SMALL, counted).fingerprint == before
    other = {**small, VARIANCE: small[VARIANCE] + 1}
    assert artifact_of(SMALL, other).fingerprint != before
    patch = replace(SMALL, patch_size=8)  # means nothing here
    assert artifact_of(patch, small).fingerprint == before


def test_the_repositorys_model_is_still_the_same() -> None:
    """Collections hold this fingerprint: another one would turn them into a foreign model's."""
    assert read_artifact(DEFAULT_MODEL).fingerprint == "9799cc5f78fcdc8a"


def test_a_resnet50_in_half_precision(resnet50: dict[str, Tensor], tmp_path: Path) -> None:
    variance = resnet50["bn1.running_var"].clone()
    variance[0] = 1e5  # float16 ends at 65504
    wide = {**resnet50, "bn1.running_var": variance}
    artifact = artifact_of(RESNET50, wide)
    half = replace(artifact, weights=half_precision(wide, RESNET50))
    write_artifact(half, tmp_path / "half.safetensors")
    stored = load_file(tmp_path / "half.safetensors")
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert kinds["layer4.2.conv3.weight"] == kinds["bn1.weight"] == torch.float16
    assert kinds["bn1.running_mean"] == kinds["bn1.running_var"] == torch.float32
    assert kinds["bn1.num_batches_tracked"] == torch.int64
    assert (tmp_path / "half.safetensors").stat().st_size < 2.05 * 23_508_032

    pictures = F.interpolate(5 * torch.randn(4, 3, 3, 3), size=(64, 64), mode="bicubic")
    exact = artifact.network()(pictures).cls
    rounded = read_artifact(tmp_path / "half.safetensors").network()(pictures).cls
    assert rounded.dtype == torch.float32
    spread = exact - exact.mean(dim=0)  # what tells pictures apart
    assert 0 < float((rounded - exact).norm() / spread.norm()) < 0.01


def spoiled(change: Callable[[Tensor], Tensor], name: str) -> Callable[..., dict[str, Tensor]]:
    return lambda weights: {**weights, name: change(weights[name])}


WRONG: dict[str, tuple[Callable[..., dict[str, Tensor]], str]] = {
    "a count of floats": (spoiled(Tensor.float, COUNT), f"{COUNT} in .* is torch.float32"),
    "a count of 32 bits": (spoiled(Tensor.int, COUNT), f"{COUNT} in .* is torch.int32"),
    "a variance of whole numbers": (spoiled(Tensor.long, VARIANCE), f"{VARIANCE} in .*[.]int64"),
    "a variance of 16 bits": (spoiled(Tensor.half, VARIANCE), ""),
    "NaN": (spoiled(lambda t: t * float("nan"), VARIANCE), f"{VARIANCE} .* not finite"),
    "no count": (lambda w: {k: v for k, v in w.items() if k != COUNT}, f"missing .*{COUNT}"),
    "a classifier": (lambda w: {**w, "fc.weight": torch.ones(3)}, r"unknown \['fc.weight'\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_weights(small: dict[str, Tensor], tmp_path: Path, what: str) -> None:
    change, said = WRONG[what]
    artifact = artifact_of(SMALL, change(small))
    if said:
        with pytest.raises(ArtifactError, match=said):
            write_artifact(artifact, tmp_path / "m.safetensors")
    else:
        write_artifact(artifact, tmp_path / "m.safetensors")


def test_a_crop_that_the_network_cannot_take(tmp_path: Path) -> None:
    described = Architecture(name="inception_v3")
    artifact = Artifact(
        architecture=described, preprocess=Preprocess(resize=80, crop=74), weights={}
    )
    with pytest.raises(ArtifactError, match="crop 74 is smaller than the 75 pixels"):
        write_artifact(artifact, tmp_path / "m.safetensors")


# ---- Original checkpoints


def saved(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "dino_resnet50_pretrain.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_the_original_resnet50(resnet50: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path, {f"{prefix}{k}": v for k, v in resnet50.items()})
    artifact = read_checkpoint(path)
    assert artifact.architecture == RESNET50
    sizes = artifact.preprocess
    assert (sizes.resize, sizes.crop, sizes.copy_size) == (256, 224, 320)
    same(artifact, resnet50)
    assert load_model(str(path)).artifact.fingerprint == artifact.fingerprint


def test_a_full_checkpoint(tmp_path: Path) -> None:
    weights = trained(Architecture(name="resnet18", in_channels=4))
    head = {"mlp.0.weight": torch.zeros(8, 512), "last_layer.weight_g": torch.ones(8, 1)}
    tensors = {f"module.backbone.{k}": v for k, v in weights.items()}
    tensors |= {f"module.head.{k}": v for k, v in head.items()}
    path = saved(tmp_path, {"student": {}, "teacher": tensors, "epoch": 3})
    backbone, found_head = read_tensors(path)
    assert backbone.keys() == weights.keys()
    torch.testing.assert_close(found_head, head)
    artifact = read_checkpoint(path)
    same(artifact, weights)
    assert artifact.preprocess.mean == (0.5,) * 4
    write_artifact(artifact, tmp_path / "m.safetensors")


def test_supervised_weights_of_torchvision_load_without_their_classifier(tmp_path: Path) -> None:
    weights = trained(Architecture(name="resnet34"))
    classifier = {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}
    artifact = read_checkpoint(saved(tmp_path, {**weights, **classifier}))
    assert artifact.architecture.name == "resnet34"
    same(artifact, weights)


MISFITS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a layer less": ({"layer4.2.bn3.bias": None}, r"not those of resnet50.*layer4\.2\.bn3\.bias"),
    "another shape": ({"bn1.weight": torch.ones(7)}, r"bn1\.weight .* shape \[7\], not \[64\]"),
    "a flat kernel": ({"conv1.weight": torch.ones(64)}, r"conv1\.weight .* shape \[64\]"),
    "no channel": ({"conv1.weight": torch.ones(64, 0, 7, 7)}, "in_channels is 0"),
    "no first layer": ({"conv1.weight": None}, r"missing \['conv1.weight'\]"),
    "not finite": ({"bn1.weight": torch.full((64,), torch.inf)}, "finite"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_the_nearest_resnet_tells_what_does_not_fit(
    resnet50: dict[str, Tensor], tmp_path: Path, what: str
) -> None:
    changes, said = MISFITS[what]
    content = {k: v for k, v in {**resnet50, **changes}.items() if v is not None}
    with pytest.raises(ArtifactError, match=said):
        read_checkpoint(saved(tmp_path, content))


def test_the_published_resnet50_is_known() -> None:
    url = pretrained.DOWNLOADS["dino_resnet50"].url
    assert url.endswith("/dino_resnet50_pretrain/dino_resnet50_pretrain.pth")
