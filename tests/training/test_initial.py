"""Weights that a run starts from, out of files that the tests write in each of the forms."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbone.architectures import Architecture
from backbone.artifact import Artifact, half_precision, write_artifact
from backbone.preprocess import Preprocess
from backbone.pretrained import load_model
from backbone.vit import VisionTransformer
from tests.training.conftest import TINY_RECIPE, toml, write_pictures
from training import pretrain, snapshot
from training.dino import Network, ProjectionHead
from training.initial import load_initial
from training.tables import ConfigError

VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HEAD: dict[str, Any] = {"hidden_dim": 32, "bottleneck_dim": 16}


def network(made: Any = VIT, *, seed: int = 0, out_dim: int = 64, **changes: Any) -> Network:
    """A student on an `Architecture`, or on a ViT smaller than any that has a name."""
    torch.manual_seed(seed)
    backbone: Any = (
        made.build() if isinstance(made, Architecture) else VisionTransformer(**{**VIT, **made})
    )
    head = ProjectionHead(backbone.embed_dim, out_dim, **{**HEAD, **changes})
    student = Network(backbone, head)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    return student


def full_checkpoint(path: Path, student: Network, teacher: Network) -> Path:
    """What the original's main_dino.py saves."""
    content = {
        "student": {f"module.{k}": v for k, v in student.state_dict().items()},
        "teacher": teacher.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny"),
    }
    torch.save(content, path)
    return path


def same(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    ours = module.state_dict()
    return ours.keys() == weights.keys() and all(torch.equal(ours[k], weights[k]) for k in ours)


def test_a_full_checkpoint_gives_the_teacher_with_its_head(tmp_path: Path) -> None:
    teacher, start = network(seed=1), network(seed=2)
    path = full_checkpoint(tmp_path / "checkpoint.pth", network(seed=3), teacher)
    said = load_initial(str(path), start.backbone, start.head)
    assert same(start, teacher.state_dict())
    assert said == f"init_from {path}: backbone taken; head taken"


def test_a_run_gives_its_newest_teacher_with_its_head(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 4)
    (tmp_path / "recipe.toml").write_text(toml({**TINY_RECIPE, "epochs": 2, "snapshot_steps": 1}))
    run = tmp_path / "run"
    paths = [f"data.train={tmp_path / 'pictures'}", f"run_dir={run}"]
    assert pretrain.main([str(tmp_path / "recipe.toml"), *paths]) == 0
    found = snapshot.latest(run)
    assert found is not None
    assert found[0] == 2
    teacher = snapshot.load(found[1])["teacher"]
    described = Architecture(name="vit_tiny", patch_size=8, image_size=16)
    (run / "config.json").write_text("{}")  # somebody else's
    for name in (run, found[1]):  # the folder, or one of its snapshots by its path
        start = network(described)
        assert load_initial(str(name), start.backbone, start.head).endswith("head taken")
        assert same(start, teacher)

    shutil.rmtree(run / "snapshots")
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"init_from = '.*run': this folder holds no snapshot"):
        load_initial(str(run), start.backbone, start.head)
    found[1].parent.mkdir()
    found[1].write_bytes(b"PK no snapshot")
    with pytest.raises(ConfigError, match=r"init_from = .*is damaged: '.*step_000000002\.pt'"):
        load_initial(str(run), start.backbone, start.head)


def test_an_artifact_gives_a_backbone_alone(tmp_path: Path) -> None:
    described = Architecture(name="vit_tiny", patch_size=8, image_size=16)
    given, start = network(described, seed=1), network(described, seed=2)
    before = {k: v.clone() for k, v in start.head.state_dict().items()}
    path = tmp_path / "m.safetensors"
    weights = half_precision(given.backbone.state_dict(), described)
    preprocess = Preprocess.in_proportion(16, patch_size=8)
    write_artifact(Artifact(architecture=described, preprocess=preprocess, weights=weights), path)
    said = load_initial(str(path), start.backbone, start.head)
    assert said.endswith("backbone taken; head starts afresh: there is none in it")
    assert same(start.head, before)
    assert {p.dtype for p in start.backbone.parameters()} == {torch.float32}
    assert same(
        start.backbone, {k: v.half().float() for k, v in given.backbone.state_dict().items()}
    )


def test_a_folder_of_transformers_gives_a_backbone_alone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    described = Architecture(name="vit_tiny", patch_size=8, image_size=16)
    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=8
    )
    torch.manual_seed(1)
    transformers.ViTModel(config).save_pretrained(tmp_path / "hub")
    start = network(described, seed=2)
    said = load_initial(str(tmp_path / "hub"), start.backbone, start.head)
    assert "backbone taken (positions interpolated, bicubic, from 4 x 4 patches to 2 x 2)" in said
    assert said.endswith("head starts afresh: there is none in it")
    given = load_model(str(tmp_path / "hub")).artifact.weights
    ours = start.backbone.state_dict()
    assert all(torch.equal(ours[k], given[k]) for k in given if k != "pos_embed")


def test_the_repositorys_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name does not hide it
    artifact = load_model("default").artifact
    start = network(artifact.architecture)
    load_initial("default", start.backbone, start.head)
    assert same(start.backbone, {k: v.float() for k, v in artifact.weights.items()})


@pytest.mark.parametrize("side", [16, 64])
def test_positions_are_interpolated_to_the_recipes_grid(tmp_path: Path, side: int) -> None:
    given = network(seed=1)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ramp = torch.zeros(1, 17, 24)
    ramp[0, 0, :] = 5.0  # the CLS token's own
    ramp[0, 1:, 0], ramp[0, 1:, 1] = rows.flatten(), columns.flatten()
    given.backbone.pos_embed.data.copy_(ramp)
    path = full_checkpoint(tmp_path / "checkpoint.pth", given, given)
    start = network({"image_size": side}, seed=2)
    said = load_initial(str(path), start.backbone, start.head)
    n = side // 8
    assert f"(positions interpolated, bicubic, from 4 x 4 patches to {n} x {n})" in said
    positions = start.backbone.pos_embed.detach()
    assert torch.equal(positions[0, 0], ramp[0, 0])
    grid = positions[0, 1:].reshape(n, n, 24)
    # Half way through the grid lies half way up each ramp, whichever its axis: nothing is turned.
    assert grid[..., 0].mean().item() == pytest.approx(1.5, abs=1e-4)
    assert torch.allclose(grid[..., 0], grid[..., 1].T, atol=1e-5)
    assert bool((grid[1:, :, 0] > grid[:-1, :, 0]).all())
    rest = {k: v for k, v in given.backbone.state_dict().items() if k != "pos_embed"}
    ours = start.backbone.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in rest.items())


def test_a_resnet_with_its_batch_norms(tmp_path: Path) -> None:
    described = Architecture(name="resnet18", image_size=32)
    given, start = network(described, seed=1), network(described, seed=2)
    given.backbone.train()(torch.randn(2, 3, 32, 32))
    path = full_checkpoint(tmp_path / "checkpoint.pth", given, given)
    assert load_initial(str(path), start.backbone, start.head).endswith("head taken")
    assert same(start, given.state_dict())
    assert int(start.backbone.state_dict()["bn1.num_batches_tracked"]) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"out_dim": 32}, r"last_layer.weight_g is [64, 1] there and [32, 1] in the recipe"),
        ({"hidden_dim": 8}, "mlp.0.weight is [32, 24] there and [8, 24] in the recipe"),
        ({"layers": 4}, "mlp.6.weight is missing"),
        ({"batch_norm": True}, "is missing"),
        ({"predictor": True}, "predictor.0.weight is missing"),
        ({"bottleneck": False}, "last_layer.weight_g is unknown"),
    ],
)
def test_another_head_starts_afresh(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    given, start = network(seed=1), network(seed=2, **changes)
    before = {k: v.clone() for k, v in start.head.state_dict().items()}
    path = full_checkpoint(tmp_path / "checkpoint.pth", given, given)
    said = load_initial(str(path), start.backbone, start.head)
    assert "head starts afresh: the one in it is another (" in said
    assert why in said
    assert "\n" not in said
    assert same(start.head, before)
    assert same(start.backbone, given.backbone.state_dict())


def test_trained_gains_are_not_frozen(tmp_path: Path) -> None:
    given = network(seed=1, norm_last_layer=False)
    path = full_checkpoint(tmp_path / "checkpoint.pth", given, given)
    start = network(seed=2)
    assert "gains were trained" in load_initial(str(path), start.backbone, start.head)
    free = network(seed=2, norm_last_layer=False)
    assert load_initial(str(path), free.backbone, free.head).endswith("head taken")


@pytest.mark.parametrize(
    ("made", "misfit"),
    [
        (
            {"patch_size": 16},
            "patch_embed.proj.weight is [24, 3, 8, 8] there and [24, 3, 16, 16] in the recipe",
        ),
        (
            {"in_channels": 1},
            "patch_embed.proj.weight is [24, 3, 8, 8] there and [24, 1, 8, 8] in the recipe",
        ),
        ({"embed_dim": 12}, "cls_token is [1, 1, 24] there and [1, 1, 12] in the recipe; pos"),
        ({"depth": 1}, "blocks.1.norm1.weight is unknown; blocks.1.norm1.bias is unknown; "),
        (
            Architecture(name="resnet18", image_size=32),
            "conv1.weight is missing; bn1.weight is missing; bn1.bias is missing; and ",
        ),
    ],
)
def test_another_network_is_an_error_that_names_the_first_misfits(
    tmp_path: Path, made: Any, misfit: str
) -> None:
    given, start = network(seed=1), network(made, seed=2)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    path = full_checkpoint(tmp_path / "checkpoint.pth", given, given)
    with pytest.raises(ConfigError) as caught:
        load_initial(str(path), start.backbone, start.head)
    assert misfit in str(caught.value)
    assert f"init_from = {str(path)!r}" in str(caught.value)
    assert same(start, before)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    given, start = network(seed=1), network(seed=2)
    given.backbone.norm.bias.data[3] = torch.nan
    path = full_checkpoint(tmp_path / "checkpoint.pth", given, given)
    with pytest.raises(ConfigError, match=r"not finite: norm\.bias"):
        load_initial(str(path), start.backbone, start.head)


@pytest.mark.parametrize("name", ["dino_vits61", "runs/none", "none.pth"])
def test_nothing_by_that_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"init_from = '{name}': .*neither a file nor one of"):
        load_initial(name, nn.Linear(1, 1), nn.Linear(1, 1))


class Malice:
    """Leaves a trace when it is unpickled by a careless reader."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    trace, start = tmp_path / "trace", network()
    path = tmp_path / "checkpoint.pth"
    torch.save({"teacher": start.state_dict(), "extra": Malice(trace)}, path)
    with pytest.raises(ConfigError, match="cannot be read safely"):
        load_initial(str(path), start.backbone, start.head)
    folder = tmp_path / "run" / "snapshots"
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "step_000000001.pt")
    with pytest.raises(ConfigError, match="damaged"):
        load_initial(str(tmp_path / "run"), start.backbone, start.head)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trace.exists()
