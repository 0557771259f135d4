import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT, TINY_RECIPE, toml
from training.auto import Scale, center_momentum, out_dim, teacher_momentum, warmup_epochs
from training.config import ConfigError, Recipe, load_recipe, recipe_to_dict

SMALL_DATA = ROOT / "training" / "recipes" / "small_data.toml"
IMAGENET = 1_281_167
AUTOS = {
    "head": ("out_dim",),
    "teacher": ("momentum",),
    "loss": (
        "teacher_temperature",
        "warmup_teacher_temperature",
        "warmup_teacher_epochs",
        "center_momentum",
    ),
    "optimizer": ("warmup_epochs",),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe in which everything that can be is "auto"."""
    table: dict[str, Any] = {**TINY_RECIPE, "data": {"train": "x"}, "precision": "auto"}
    for name, keys in AUTOS.items():
        table[name] = {**table.get(name, {}), **dict.fromkeys(keys, "auto")}
    file = tmp_path / "recipe.toml"
    file.write_text(toml(table))
    return file


def load(path: Path, pictures: int, *overrides: str, processes: int = 1) -> Recipe:
    return load_recipe(path, overrides, lambda _: pictures, processes=processes)


def test_the_papers_scale_gives_the_papers_values(path: Path) -> None:
    recipe = load(path, IMAGENET, "epochs=300", "batch_size=64", processes=16)
    assert recipe.head.out_dim == 65536
    assert recipe.teacher.momentum == pytest.approx(0.996)
    assert (recipe.loss.warmup_teacher_temperature, recipe.loss.teacher_temperature) == (0.04, 0.07)
    assert recipe.loss.warmup_teacher_epochs == 30
    assert recipe.loss.center_momentum == 0.9
    assert recipe.optimizer.warmup_epochs == 10


def test_a_small_scale_gives_careful_values(path: Path) -> None:
    recipe = load(path, 5_000, "epochs=60", "batch_size=32")
    assert recipe.head.out_dim == 1024
    assert recipe.teacher.momentum == pytest.approx(1 - 1 / (0.02 * 60 * 156), abs=1e-5)
    assert recipe.loss.teacher_temperature == 0.04
    assert recipe.loss.warmup_teacher_temperature == 0.04
    assert recipe.loss.warmup_teacher_epochs == 0
    assert recipe.loss.center_momentum == 0.975
    assert recipe.optimizer.warmup_epochs == pytest.approx(6)


def test_the_shortest_of_runs_can_be_run(path: Path) -> None:
    recipe = load(path, 1, "epochs=1")
    assert recipe.teacher.momentum == pytest.approx(0.9)
    assert recipe.optimizer.warmup_epochs == pytest.approx(0.1)


def test_later_choices_follow_what_the_recipe_says(path: Path) -> None:
    recipe = load(path, 5_000, "epochs=50", "loss.teacher_temperature=0.06")
    assert recipe.loss.warmup_teacher_temperature == 0.04
    assert recipe.loss.warmup_teacher_epochs == 15
    cold = load(path, IMAGENET, "epochs=300", "batch_size=1024", "head.out_dim=1024")
    assert cold.loss.teacher_temperature == 0.04
    lower = load(path, 5_000, "loss.teacher_temperature=0.03")
    assert (lower.loss.warmup_teacher_temperature, lower.loss.warmup_teacher_epochs) == (0.03, 0)


@pytest.mark.parametrize(
    ("pictures", "k"),
    [(10, 1024), (20_000, 1024), (75_000, 4096), (130_000, 8192), (10**6, 65536), (10**9, 65536)],
)
def test_out_dim(pictures: int, k: int) -> None:
    assert out_dim(Scale(pictures=pictures, batch=64, epochs=1), {})[0] == k


def test_the_teacher_averages_over_as_many_pictures_whatever_the_batch() -> None:
    def momentum(batch: int, epochs: int = 100) -> float:
        return teacher_momentum(Scale(pictures=IMAGENET, batch=batch, epochs=epochs), {})[0]

    assert momentum(1024) == pytest.approx(0.996)
    assert momentum(128) == momentum(32) == pytest.approx(0.9995)
    assert momentum(256) == pytest.approx(0.996 ** (256 / 1024), abs=1e-5)
    assert momentum(128, epochs=1) == pytest.approx(1 - 1 / 200, abs=1e-4)  # 2% of 10,009 steps


def test_small_batches_get_a_slower_centre() -> None:
    found = [
        center_momentum(Scale(pictures=1000, batch=batch, epochs=1), {})[0]
        for batch in (1024, 128, 64, 8, 1)
    ]
    assert found == [0.9, 0.9, 0.95, 0.99, 0.99]


def test_the_warm_up_is_shorter_than_the_run() -> None:
    assert warmup_epochs(Scale(pictures=9, batch=1, epochs=3), {})[0] == pytest.approx(0.3)


def test_each_choice_is_told_in_a_line_with_its_reason(path: Path) -> None:
    said: list[str] = []
    load_recipe(path, [], lambda _: 5_000, say=said.append)
    keys = [f"{name}.{key}" for name, several in AUTOS.items() for key in several]
    assert sorted(line.partition(" = ")[0] for line in said) == sorted(keys)
    assert said[0] == (
        "head.out_dim = 1024 (auto): 4.88 of 5000 pictures to a dimension, near 16 wished"
    )
    assert all("\n" not in line and "(auto): " in line for line in said)


def test_the_pictures_are_counted_only_where_they_decide(path: Path) -> None:
    def count(recipe: Recipe) -> int:
        assert recipe.data.train == ("my/pictures",)
        return 5_000

    assert load_recipe(path, ["data.train=my/pictures"], count).head.out_dim == 1024
    plain = [f"{name}.{key}=0.5" for name, several in AUTOS.items() for key in several]
    plain += ["head.out_dim=99", "loss.warmup_teacher_epochs=1"]

    def refuse(_: Recipe) -> int:
        raise AssertionError("counted for nothing")

    assert load_recipe(path, plain, refuse).head.out_dim == 99


def test_the_settled_recipe_holds_no_auto(path: Path) -> None:
    settled = load(path, 5_000, "precision=fp32", "strategy=ddp", "data.augment=workers")
    assert "auto" not in json.dumps({**recipe_to_dict(settled), "device": "cpu"})


def test_without_a_count_auto_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head\.out_dim = 'auto'.*number of pictures"):
        load_recipe(path)


@pytest.mark.parametrize(
    "key", ["epochs", "optimizer.lr", "batch_size", "loss.student_temperature"]
)
def test_auto_elsewhere_is_refused(path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.") + r" = 'auto': must be a"):
        load(path, 5_000, f"{key}=auto")


def test_no_pictures(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train"):
        load(path, 0)


@pytest.mark.parametrize("pictures", [5_000, 30_000, 100_000])
def test_small_data(pictures: int) -> None:
    recipe = load(SMALL_DATA, pictures, "data.train=my/pictures")
    assert recipe.head.out_dim <= pictures / 4
    assert 0.98 <= recipe.teacher.momentum <= 0.9995
