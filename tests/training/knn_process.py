"""One process of several that measure k-NN together: `torchrun -m`, with the labelled folder."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.training.conftest import TINY_RECIPE
from training.attention_maps import attention_maps
from training.config import Recipe, recipe_from_dict
from training.distributed import World, world
from training.online_knn import OnlineKnn
from training.sources import open_pictures
from training.state import make_training


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


def networks(recipe: Recipe, here: World) -> dict[str, nn.Module]:
    """The backbones of a run, in shards where there are several processes."""
    torch.manual_seed(0)
    training = make_training(replace(recipe, strategy="fsdp"), here)
    return {"student": training.student.backbone, "teacher": training.teacher.backbone}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with world("cpu") as here:
        made = recipe(folder)
        found = OnlineKnn(made, here).measure(3, 0, networks(made, here))
        maps = attention_maps(made, open_pictures([folder / "train"]), here)
        assert maps is not None
        maps.store(3, 0, networks(made, here)["teacher"])
        (folder / f"{here.size}.{here.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
