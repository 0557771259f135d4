"""A folder in the published layout of revisited Oxford, small and made up."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from tests.training.conftest import picture


def write_landmarks(folder: Path, dataset: str, *, protocol: int = 2) -> dict[str, Any]:
    """Two places, a and b, of two pictures each, and one of neither; returns the ground truth."""
    (folder / "jpg").mkdir(parents=True)
    seeds = {"a0": 1, "a1": 1, "b0": 2, "b1": 2, "c0": 3, "qa": 1, "qb": 2}
    for name, seed in seeds.items():
        picture(seed).save(folder / "jpg" / f"{name}.jpg", quality=60 + 5 * len(name) * seed)
    gnd = {
        "imlist": ["a0", "a1", "b0", "b1", "c0"],
        "qimlist": ["qa", "qb"],
        "gnd": [
            {"bbx": [4.4, 2, 20, 18], "easy": [0], "hard": [1], "junk": [4]},
            {
                "bbx": np.array([0.0, 0.0, 24.0, 20.0]),
                "easy": np.array([2]),
                "hard": [3],
                "junk": [],
            },
        ],
    }
    (folder / f"gnd_{dataset}.pkl").write_bytes(pickle.dumps(gnd, protocol=protocol))
    return gnd
