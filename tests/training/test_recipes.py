import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT
from training.config import load_recipe, recipe_to_dict

RECIPES = sorted((ROOT / "training" / "recipes").rglob("*.toml"))
ABLATIONS = sorted((ROOT / "training" / "recipes" / "ablations").glob("*.toml"))
BATCHES = {"batch_128": 128, "batch_256": 256, "batch_512": 512}
CHANGES: dict[str, dict[str, Any]] = {
    "batch_128": {"batch_size": 8},
    "batch_256": {"batch_size": 16},
    "batch_512": {"batch_size": 32},
    "batch_softmax": {"loss.assignment": "batch_softmax", "loss.centering": False},
    "center_momentum_0": {"loss.center_momentum": 0.0},
    "center_momentum_099": {"loss.center_momentum": 0.99},
    "center_momentum_0999": {"loss.center_momentum": 0.999},
    "head_1_layer": {"head.layers": 1},
    "head_2_layers": {"head.layers": 2},
    "head_3_layers": {},
    "head_4_layers": {"head.layers": 4},
    "head_batch_norm": {"head.batch_norm": True},
    "head_no_bottleneck": {"head.bottleneck": False},
    "head_relu": {"head.activation": "relu"},
    "k_1024": {"head.out_dim": 1024},
    "k_16384": {"head.out_dim": 16384},
    "k_262144": {"head.out_dim": 262144},
    "k_4096": {"head.out_dim": 4096},
    "mse": {"loss.kind": "mse"},
    "no_centering": {"loss.centering": False},
    "no_multi_crop": {"crops.global_scale": [0.14, 1.0], "crops.local_count": 0},
    "no_sharpening": {
        "loss.teacher_temperature": 0.1,
        "loss.warmup_teacher_temperature": 0.1,
        "loss.warmup_teacher_epochs": 0,
    },
    "patch_5": {"model.patch_size": 5, "batch_size": 8, "accumulation": 8},
    "patch_8": {"model.patch_size": 8, "batch_size": 16, "accumulation": 4},
    "predictor": {"head.predictor": True},
    "sinkhorn_knopp": {"loss.assignment": "sinkhorn_knopp", "loss.centering": False},
    "sinkhorn_knopp_and_centering": {"loss.assignment": "sinkhorn_knopp"},
    "teacher_previous_epoch": {"teacher.kind": "previous_epoch"},
    "teacher_previous_iteration": {"teacher.kind": "previous_iteration"},
    "teacher_student_copy": {"teacher.kind": "student_copy"},
    "teacher_temperature_008": {
        "loss.teacher_temperature": 0.08,
        "loss.warmup_teacher_temperature": 0.08,
        "loss.warmup_teacher_epochs": 0,
    },
}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["data.train=my/pictures"], lambda _: 30_000)
    assert loaded.data.train == ("my/pictures",)
    loaded.architecture.build()


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_changes_what_its_name_says_and_nothing_else(path: Path) -> None:
    def values(recipe: Path) -> dict[str, Any]:
        return flat(recipe_to_dict(load_recipe(recipe, ["data.train=x"])))

    own, base = values(path), values(path.parent / tomllib.loads(path.read_text())["base"])
    changed = {key: value for key, value in own.items() if value != base[key]}
    assert changed.pop("run_dir") == f"runs/ablations/{path.stem}"
    assert changed == CHANGES[path.stem]
    whole = own["batch_size"] * own["accumulation"] * 16  # 2 nodes of 8 GPUs
    assert whole == BATCHES.get(path.stem, 1024)
    assert len(path.read_text().splitlines()) < 12


def test_every_ablation_is_there() -> None:
    assert {path.stem for path in ABLATIONS} == CHANGES.keys()


@pytest.mark.parametrize(
    ("name", "batch", "epochs"),
    [
        ("vit_small_16_100ep", 1024, 100),
        ("vit_small_16", 1024, 300),
        ("vit_small_8", 1024, 800),
        ("vit_base_16", 1024, 400),
        ("vit_base_8", 1056, 300),
        ("resnet50", 4080, 800),
        ("resnet50_100ep", 512, 100),
    ],
)
def test_the_papers_recipes_make_the_papers_batches(name: str, batch: int, epochs: int) -> None:
    path = ROOT / "training" / "recipes" / f"{name}.toml"
    recipe = load_recipe(path, ["data.train=x"])
    assert recipe.batch_size * recipe.accumulation * 16 == batch
    assert recipe.epochs == epochs
    assert f"training/recipes/{name}.toml data.train=path/to/pictures" in path.read_text()
