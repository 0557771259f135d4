"""The golden values: by default those beside this file, or another folder of the same layout."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


class Golden:
    """`golden[name]` gives a section of golden.json; `golden.tensors(name)` a tensor file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = json.loads((folder / "golden.json").read_text())

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


def golden_folder() -> Path:
    return Path(os.environ.get("DINOSCOPE_GOLDEN", Path(__file__).parent / "data"))


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(golden_folder())
