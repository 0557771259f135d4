from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import TINY_RECIPE, toml
from training.config import ConfigError, Recipe, load_recipe, recipe_from_dict, recipe_to_dict


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(toml(TINY_RECIPE))
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, ["data.train=pictures", *overrides])
    return str(caught.value)


def test_the_defaults_are_the_originals() -> None:
    recipe = recipe_from_dict({"data": {"train": "x"}})
    assert recipe.head.out_dim == 65536
    assert (recipe.loss.student_temperature, recipe.loss.teacher_temperature) == (0.1, 0.04)
    assert (recipe.loss.center_momentum, recipe.teacher.momentum) == (0.9, 0.996)
    assert (recipe.optimizer.lr, recipe.optimizer.min_lr) == (5e-4, 1e-6)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.weight_decay_end) == (0.04, 0.4)
    assert (recipe.optimizer.clip_grad, recipe.optimizer.freeze_last_layer_epochs) == (3.0, 1)
    assert (recipe.crops.global_scale, recipe.crops.local_scale) == ((0.4, 1.0), (0.05, 0.4))


def test_a_recipe_needs_pictures(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train"):
        load_recipe(path)
    with pytest.raises(ConfigError, match=r"data\.train"):
        load_recipe(path, ["data.train=[]"])


def test_overrides(path: Path) -> None:
    overrides = [
        'data.train=["a.tar", "b.tar"]',
        "run_dir=runs/a=b",
        "optimizer.lr=1e-3",
        "optimizer.warmup_epochs=2",
        "crops.local_scale=[0.2, 1]",
        "head.batch_norm=true",
        "precision=bf16",
        "seed=7",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.data.train == ("a.tar", "b.tar")
    assert recipe.run_dir == "runs/a=b"
    assert recipe.optimizer.lr == 1e-3
    assert recipe.optimizer.warmup_epochs == 2.0
    assert recipe.crops.local_scale == (0.2, 1.0)
    assert recipe.head.batch_norm is True
    assert (recipe.precision, recipe.seed) == ("bf16", 7)
    assert recipe.optimizer.min_lr == 1e-6  # what is not named stays
    assert recipe.head.out_dim == TINY_RECIPE["head"]["out_dim"]


def test_a_later_override_wins(path: Path) -> None:
    assert load_recipe(path, ["data.train=a", "seed=1", "data.train=b"]).data.train == ("b",)


def test_to_dict_and_back(path: Path) -> None:
    recipe = load_recipe(path, ['data.train=["a", "b"]', "crops.global_scale=[0.3, 0.9]"])
    table = recipe_to_dict(recipe)
    assert table["data"]["train"] == ["a", "b"]
    assert recipe_from_dict(table) == recipe
    assert recipe_from_dict({**table, "seed": 99}) != recipe


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("batchsize=3", "batch_size"),
        ("optimizer.learning_rate=3", "optimizer."),
        ("optimizer.weightdecay=3", "optimizer.weight_decay"),
        ("crops.global_sise=3", "crops.global_size"),
        ("lr=3", "optimizer.lr"),
        ("momentum=3", "teacher.momentum"),
        ("modle.patch_size=8", "model'"),
        ("optimiser.lr=1", "optimizer"),
    ],
)
def test_an_unknown_key_names_the_nearest(path: Path, override: str, nearest: str) -> None:
    said = refusal(path, override)
    assert "unknown key" in said
    assert override.partition("=")[0].partition(".")[0] in said
    assert f"did you mean '{nearest}" in said


def test_a_key_like_no_other_gets_the_list(path: Path) -> None:
    said = refusal(path, "qqqqqqqq=1")
    assert "'qqqqqqqq'" in said
    assert "batch_size" in said


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("epochs=many", "a whole number"),
        ("epochs=1.5", "a whole number"),
        ("epochs=true", "a whole number"),
        ("optimizer.lr=fast", "a number"),
        ("optimizer.lr=true", "a number"),
        ("head.batch_norm=1", "true or false"),
        ("precision=16", "a string"),
        ("data.train=5", "a list"),
        ("data.train=[1, 2]", "a string"),
        ("crops.local_scale=0.5", "a list"),
        ("crops.local_scale=[0.1, 0.2, 0.3]", "two numbers"),
        ('crops.local_scale=[0.1, "x"]', "a number"),
        ("model=3", "a table"),
        ("seed.deep=3", "not a table"),
    ],
)
def test_a_value_of_the_wrong_type(path: Path, override: str, rule: str) -> None:
    said = refusal(path, override)
    assert rule in said
    assert override.partition("=")[0] in said


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("epochs=0", "at least 1"),
        ("batch_size=-2", "at least 1"),
        ("log_steps=0", "at least 1"),
        ("snapshot_steps=0", "at least 1"),
        ("seed=-1", "0 to 2**32 - 1"),
        ("seed=100000000000000000000", "0 to 2**32 - 1"),
        ("device=tpu", "auto, cpu, cuda"),
        ("precision=int8", "auto, fp32, bf16"),
        ("data.workers=-1", "at least 0"),
        ("model.drop_path_rate=1.0", "below 1"),
        ("head.layers=0", "at least 1"),
        ("crops.local_count=-1", "at least 0"),
        ("crops.global_scale=[0.5, 0.4]", "low <= high"),
        ("crops.local_scale=[0.0, 0.4]", "0 < low"),
        ("crops.local_scale=[0.1, 1.4]", "high <= 1"),
        ("crops.blur=[2.0, 0.1]", "low <= high"),
        ("crops.blur=[-0.1, 1.0]", "0 <= low"),
        ("crops.local_size=7", "patch_size 8"),
        ("crops.local_size=0", "at least 1"),
        ("loss.teacher_temperature=0", "above 0"),
        ("loss.student_temperature=nan", "finite"),
        ("loss.center_momentum=1.5", "from 0 to 1"),
        ("loss.warmup_teacher_epochs=-1", "at least 0"),
        ("teacher.momentum=-0.1", "from 0 to 1"),
        ("optimizer.name=adam", "adamw, sgd, lars"),
        ("optimizer.lr=0", "above 0"),
        ("optimizer.lr=inf", "finite"),
        ("optimizer.weight_decay=-1", "at least 0"),
        ("optimizer.warmup_epochs=4", "fewer than epochs = 4"),
    ],
)
def test_a_value_out_of_range(path: Path, override: str, rule: str) -> None:
    said = refusal(path, override)
    key, _, value = override.partition("=")
    assert key in said
    assert value.strip("[]").partition(",")[0] in said
    assert rule in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("crops.global_size=7", ["crops.global_size", "7", "patch_size 8"]),
        ("crops.global_size=0", ["crops.global_size", "0"]),
        ("model.patch_size=0", ["model", "patch_size", "0"]),
        ("model.architecture=vit_smal", ["model", "vit_smal", "did you mean 'vit_small'"]),
    ],
)
def test_a_network_that_cannot_be(path: Path, override: str, words: list[str]) -> None:
    said = refusal(path, override)
    assert all(word in said for word in words)


@pytest.mark.parametrize("override", ["epochs", "=3", ""])
def test_an_override_without_key_or_value(path: Path, override: str) -> None:
    assert "key=value" in refusal(path, override)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    def fails(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load_recipe(path, ["data.train=x"])
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "does not exist" in fails(tmp_path / "absent.toml")
    fails(tmp_path)  # a folder
    (tmp_path / "broken.toml").write_text("epochs = = 3")
    assert "not TOML" in fails(tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00\x80")
    fails(tmp_path / "binary.toml")


def test_the_recipe_tells_its_network() -> None:
    table: dict[str, Any] = {**TINY_RECIPE, "data": {"train": ["x"]}}
    recipe: Recipe = recipe_from_dict(table)
    described = recipe.architecture
    assert (described.name, described.patch_size, described.image_size) == ("vit_tiny", 8, 16)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / "top.toml"


def test_a_base_is_laid_under_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "bottom.toml").write_text(
        "epochs = 7\nseed = 1\n[crops]\nlocal_count = 3\nglobal_scale = [0.3, 0.9]\n"
    )
    (tmp_path / "middle.toml").write_text(
        'base = "bottom.toml"\nseed = 2\n[crops]\nlocal_size = 64\n'
    )
    top = tmp_path / "deep" / "top.toml"
    top.write_text('base = "../middle.toml"\n[crops]\nlocal_count = 5\nglobal_scale = [0.2, 0.8]\n')
    recipe = load_recipe(top, ["data.train=x", "optimizer.warmup_epochs=1"])
    assert (recipe.epochs, recipe.seed) == (7, 2)
    assert (recipe.crops.local_count, recipe.crops.local_size) == (5, 64)
    assert recipe.crops.global_scale == (0.2, 0.8)
    assert "base" not in recipe_to_dict(recipe)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"top": 'base = "top.toml"'}, ["base = 'top.toml'", "its own base"]),
        ({"top": 'base = "b.toml"', "b": 'base = "./top.toml"'}, ["./top.toml", "its own base"]),
        ({"top": 'base = "nowhere.toml"'}, ["nowhere.toml", "does not exist"]),
        ({"top": "base = 3"}, ["base = 3", "a path", "top.toml"]),
        ({"top": 'base = "b.toml"', "b": "= 3"}, ["b.toml", "not TOML"]),
        ({"top": 'base = "b.toml"', "b": "epoch = 3"}, ["unknown key 'epoch'"]),
    ],
)
def test_a_base_that_cannot_be(tmp_path: Path, files: dict[str, str], words: list[str]) -> None:
    said = refusal(write(tmp_path, **files))
    assert all(word in said for word in words)
