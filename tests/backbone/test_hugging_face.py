"""Folders of the Hugging Face hub, as transformers and timm write them, against those libraries."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from backbone.architectures import Architecture
from backbone.artifact import ArtifactError
from backbone.preprocess import IMAGENET_MEAN, Preprocess
from backbone.pretrained import check_name, load_model
from backbone.vit import VisionTransformer

ARCHITECTURE = Architecture(name="vit_tiny", patch_size=16, image_size=64)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def shaken(model: nn.Module) -> nn.Module:
    """With no two parameters alike, and none at the 0 or 1 that it began with."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def vit() -> Any:
    """A ViT of transformers, with the epsilon that it gives DINO's weights."""
    config = ViTConfig(
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=64,
        layer_norm_eps=1e-12,
        attn_implementation="eager",
    )
    return shaken(ViTModel(config))


@pytest.fixture(scope="module")
def written(vit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "dino-vitti16"
    vit.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=list(MEAN), image_std=list(STD)
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(written, tmp_path / written.name))


def pictures() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def network(path: Path) -> VisionTransformer:
    found = load_model(str(path)).artifact.network()
    assert isinstance(found, VisionTransformer)
    return found


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_vit_of_transformers(vit: Any, folder: Path) -> None:
    model = load_model(str(folder))
    assert model.name == "dino-vitti16"
    assert model.artifact.architecture == ARCHITECTURE
    sizes = Preprocess.in_proportion(64, patch_size=16)
    assert model.artifact.preprocess == Preprocess(
        resize=sizes.resize, crop=64, copy_size=sizes.copy_size, mean=MEAN, std=STD
    )
    assert model.artifact.provenance["source"] == "dino-vitti16"
    with torch.no_grad():
        theirs = vit(pixel_values=pictures(), output_attentions=True)
        ours = model.artifact.network()(pictures())
    # Their epsilon is 1e-12 and ours the original's 1e-6.
    torch.testing.assert_close(ours.cls, theirs.last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.patches, theirs.last_hidden_state[:, 1:], rtol=1e-4, atol=1e-4)


def test_attention_is_theirs(vit: Any, folder: Path) -> None:
    with torch.no_grad():
        theirs = vit(pixel_values=pictures(), output_attentions=True).attentions[-1]
        ours = network(folder)(pictures(), attention="full").attention
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_classifier_gives_its_backbone(vit: Any, tmp_path: Path) -> None:
    classifier = ViTForImageClassification(vit.config)
    classifier.vit.load_state_dict(vit.state_dict(), strict=False)  # it has no pooler
    classifier.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = vit(pixel_values=pictures()).last_hidden_state[:, 0]
        torch.testing.assert_close(network(tmp_path)(pictures()).cls, theirs, rtol=1e-4, atol=1e-4)


def as_bin(folder: Path) -> Path:
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    return folder


def as_a_file(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder / "model.safetensors"


@pytest.mark.parametrize("form", [as_bin, as_a_file])
def test_the_same_weights_in_another_form(folder: Path, form: Callable[[Path], Path]) -> None:
    whole = load_model(str(folder)).artifact
    other = load_model(str(form(folder))).artifact
    torch.testing.assert_close(dict(other.weights), dict(whole.weights), rtol=0, atol=0)
    assert other.preprocess.mean == (MEAN if form is as_bin else IMAGENET_MEAN)


@pytest.mark.parametrize("safe", [True, False])
def test_a_vit_of_timm(tmp_path: Path, safe: bool) -> None:
    theirs: Any = shaken(
        timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, pretrained=False)
    )
    timm.models.save_for_hf(theirs, tmp_path, model_config={}, safe_serialization=safe)
    change_json(tmp_path / "config.json", num_attention_heads=...)
    model = load_model(str(tmp_path))
    assert model.artifact.architecture == ARCHITECTURE
    assert model.artifact.preprocess.mean == (0.5, 0.5, 0.5)  # timm's for these weights
    with torch.no_grad():
        tokens = theirs.forward_features(pictures())
        ours = model.artifact.network()(pictures())
    torch.testing.assert_close(ours.cls, tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.patches, tokens[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_resnet_of_timm(tmp_path: Path) -> None:
    theirs: Any = shaken(timm.create_model("resnet18", num_classes=7, pretrained=False))
    timm.models.save_for_hf(theirs, tmp_path, model_config={})
    model = load_model(str(tmp_path)).artifact
    assert model.architecture.name == "resnet18"
    with torch.no_grad():
        ours, pooled = model.network()(pictures()).cls, theirs.forward_features(pictures())
    torch.testing.assert_close(ours, pooled.mean(dim=(2, 3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["resnetaa50", "resnetblur18", "vit_small_patch16_18x2_224"])
def test_networks_of_timm_that_only_look_like_one(tmp_path: Path, name: str) -> None:
    theirs: Any = timm.create_model(name, num_classes=0, pretrained=False)
    timm.models.save_for_hf(theirs, tmp_path, model_config={})
    refusal(tmp_path)


def test_timms_old_configuration(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    change_json(folder / "config.json", mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    assert load_model(str(folder)).artifact.preprocess.std == (0.25, 0.25, 0.25)


def test_without_a_word_on_pictures_they_are_imagenets(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert load_model(str(folder)).artifact.preprocess == Preprocess.in_proportion(
        64, patch_size=16
    )


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "dinov2"}, "model_type in .* is 'dinov2'; 'vit' can be read"),
    "another activation": ({"hidden_act": "gelu_new"}, "hidden_act in .* is 'gelu_new'; 'gelu'"),
    "other heads": ({"num_attention_heads": 6}, "num_attention_heads in .* is 6; a vit_tiny has 3"),
    "no heads": ({"num_attention_heads": "3"}, "num_attention_heads in .* is '3', not a count"),
    "timm's other layers": (
        {"model_args": {"act_layer": "quick_gelu"}},
        "model_args in .* are .*act_layer",
    ),
    "timm's other network": ({"architecture": "resnetaa50"}, "architecture in .* is 'resnetaa50'"),
    "timm's other activation": (
        {"architecture": "vit_base_patch16_clip_quickgelu_224"},
        "architecture in .* is 'vit_base_patch16_clip_quickgelu_224'",
    ),
    "no name": ({"architecture": 5}, "architecture in .* is 5"),
    "no arguments": ({"model_args": [1]}, "model_args in"),
    "a large epsilon": ({"layer_norm_eps": 1e-3}, "layer_norm_eps in .* is 0.001; from 0 to 1e-05"),
}


PICTURES: dict[str, tuple[dict[str, Any], str]] = {
    "grey": ({"image_mean": [0.5], "image_std": [0.5]}, "the mean of 1 channels; .* takes 3"),
    "uneven": ({"image_std": [0.5]}, "std 1"),
    "no deviation": ({"image_std": [0.5, 0, 0.5]}, "not positive"),
    "none": ({"image_mean": []}, "the mean of 0 channels"),
    "a mean alone": ({"image_std": ...}, "has one of image_mean and image_std without the other"),
    "giant": ({"image_mean": [10**400, 0, 0]}, "image_mean in"),
    "large": ({"image_mean": [1e308, 0, 0]}, "or beyond 1e\\+06"),
    "tiny": ({"image_std": [1e-60, 1, 1]}, "from 1e-06 to 1e\\+06"),
    "not a number": ({"image_mean": [float("nan"), 0, 0]}, "not finite"),
    "not normalised": ({"do_normalize": False}, "do_normalize in .* is False; true can be read"),
    "not scaled": ({"do_rescale": None}, "do_rescale in .* is None; true can be read"),
    "scaled otherwise": ({"rescale_factor": 1 / 127.5}, "rescale_factor in"),
    "words": ({"image_mean": "imagenet"}, "image_mean in .* is 'imagenet', not a list of numbers"),
}


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        *(("config.json", *case) for case in CONFIGS.values()),
        *(("preprocessor_config.json", *case) for case in PICTURES.values()),
    ],
    ids=[*CONFIGS, *PICTURES],
)
def test_configurations_that_are_not_the_originals(
    folder: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    change_json(folder / file, **changes)
    with pytest.raises(ArtifactError, match=words):
        load_model(str(folder))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff\xfe", b"{", b"[" * 100_000],
    ids=["", "list", "bytes", "{", "deep"],
)
def test_configurations_that_are_no_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "JSON" in refusal(folder)


def test_weights_that_are_not_there(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "lie in several files, which are not read" in refusal(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


FIRST = "encoder.layer.0.attention.attention"
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no key": (
        lambda t: t.pop(f"{FIRST}.key.bias"),
        f"holds {FIRST}.query.bias without {FIRST}.key.bias",
    ),
    "no query": (lambda t: t.pop(f"{FIRST}.query.bias"), "missing ['blocks.0.attn.qkv.bias']"),
    "another key": (
        lambda t: t.update({f"{FIRST}.key.bias": torch.zeros(3)}),
        f"{FIRST}.key.bias, {FIRST}.value.bias differ: torch.float32 [192], torch.float32 [3]",
    ),
    "another dtype": (
        lambda t: t.update({f"{FIRST}.value.bias": torch.zeros(192).half()}),
        "differ: torch.float32 [192], torch.float32 [192], torch.float16 [192]",
    ),
    "scalars": (
        lambda t: t.update(
            {f"{FIRST}.{n}.bias": torch.zeros(()) for n in ("query", "key", "value")}
        ),
        "differ: torch.float32 [], ",
    ),
    "something more": (
        lambda t: t.update({"encoder.layer.0.layer_scale1.lambda1": torch.ones(192)}),
        "unknown ['encoder.layer.0.layer_scale1.lambda1']",
    ),
    "two names": (
        lambda t: t.update({"cls_token": torch.zeros(1, 1, 192)}),
        "holds cls_token under two names",
    ),
    "no positions": (lambda t: t.pop("embeddings.position_embeddings"), "holds no ViT"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(folder: Path, name: str) -> None:
    change, words = TENSORS[name]
    change_tensors(folder, change)
    assert words in refusal(folder)


def test_what_has_no_part_in_embeddings_is_left_out(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"embeddings.mask_token": torch.zeros(1, 1, 192)}))
    assert load_model(str(folder)).artifact.architecture == ARCHITECTURE


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no tensors")
    assert "not a readable safetensors file" in refusal(path)


def test_tensors_that_are_not_there(folder: Path) -> None:
    tensors = torch.load(as_bin(folder) / "pytorch_model.bin", weights_only=True)
    for tensor in (
        torch.zeros(1).expand(10**7, 10**6),
        torch.zeros(192, device="meta"),
        torch.zeros(192).to_sparse(),
        torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged),
    ):
        torch.save({**tensors, f"{FIRST}.key.bias": tensor}, folder / "pytorch_model.bin")
        with pytest.raises(ArtifactError, match=r"pytorch_model\.bin"):
            load_model(str(folder))


def test_names_of_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for inside, name in ((folder, "."), (folder / "sub", "..")):
        inside.mkdir(exist_ok=True)
        monkeypatch.chdir(inside)
        model = load_model(name)
        assert model.name == model.artifact.provenance["source"] == "dino-vitti16"
    odd = folder.rename(folder.with_name("x.safetensors"))
    assert load_model(str(odd)).artifact.architecture == ARCHITECTURE


def test_a_folder_without_a_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"it is a folder without a config\.json"):
        check_name(str(tmp_path))
