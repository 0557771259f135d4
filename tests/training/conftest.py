"""Pictures, recipes and runs that several tests use."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.distributed import World
from training.pretrain import Rates


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks are slower on several threads, and differ from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROOT = Path(__file__).parents[2]

CPU = World(0, 1, torch.device("cpu"))
RATES = Rates(
    lr=1e-3,
    weight_decay=0.04,
    teacher_momentum=0.9,
    teacher_temperature=0.04,
    last_layer_frozen=False,
)

TINY_RECIPE: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 4,
    "seed": 3,
    "device": "cpu",
    "precision": "fp32",
    "log_steps": 1,
    "data": {"workers": 0},
    "model": {"architecture": "vit_tiny", "patch_size": 8, "drop_path_rate": 0.0},
    "head": {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16},
    "crops": {"global_size": 16, "local_count": 2, "local_size": 8},
    "optimizer": {"lr": 0.02, "warmup_epochs": 1},
}


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Coarse coloured noise: a picture that survives JPEG, and differs from seed to seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size)


def write_pictures(folder: Path, count: int, *, suffix: str = ".png") -> list[str]:
    """`count` pictures in `folder`; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}{suffix}" for i in range(count)]
    for i, name in enumerate(names):
        picture(i).save(folder / name)
    return names


def toml(table: dict[str, Any], prefix: str = "") -> str:
    """A nested dictionary of plain values as TOML."""
    values = [f"{k} = {_literal(v)}" for k, v in table.items() if not isinstance(v, dict)]
    text = "\n".join([f"[{prefix}]", *values] if prefix else values) + "\n"
    for key, value in table.items():
        if isinstance(value, dict):
            text += toml(value, f"{prefix}.{key}" if prefix else key)
    return text


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def command(*module: str) -> list[str]:
    return [sys.executable, "-m", *module]


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a real process in the repository's root, on one thread."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Runs a process to its end; gives its exit status, stdout and stderr."""
    process = start(arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def log_rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))
