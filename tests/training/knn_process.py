"""One process of several that measure k-NN together: `torchrun -m`, with the labelled folder."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.training.conftest import TINY_RECIPE
from training.config import Recipe, recipe_from_dict
from training.distributed import world
from training.online_knn import OnlineKnn


def recipe(folder: Path, **knn: Any) -> Recipe:
    return recipe_from_dict(
        {
            **TINY_RECIPE,
            "run_dir": str(folder / "run"),
            "data": {"train": "x", "workers": 0},
            "knn": {"train": f"{folder}/train", "val": f"{folder}/val", "k": 5, **knn},
        }
    )


def backbones(recipe: Recipe) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: recipe.architecture.build() for name in ("student", "teacher")}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with world("cpu") as here:
        made = recipe(folder)
        found = OnlineKnn(made, here).measure(3, 0, backbones(made))
        (folder / f"{here.size}.{here.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
