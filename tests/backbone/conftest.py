from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backbone.architectures import Architecture
from backbone.artifact import Artifact
from backbone.preprocess import Preprocess

ARCHITECTURE = Architecture(name="vit_tiny", patch_size=8, image_size=16)
PREPROCESS = Preprocess(resize=18, crop=16, copy_size=24)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return ARCHITECTURE.build().state_dict()


@pytest.fixture
def artifact(weights: dict[str, Tensor]) -> Artifact:
    return Artifact(
        architecture=ARCHITECTURE,
        preprocess=PREPROCESS,
        weights=weights,
        provenance={"licence": "CC0-1.0", "steps": 3},
        quality={"knn": {"20": {"top1": 50.0}}},
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
