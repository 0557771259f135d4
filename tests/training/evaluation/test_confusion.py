from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.preprocess import Preprocess
from tests.training.conftest import CPU, write_pictures
from training.evaluation.confusion import (
    Confused,
    Nearest,
    confusion_matrix,
    most_confused,
    nearest,
    vote,
)
from training.evaluation.knn import classify
from training.sources import open_pictures

VIEW = Preprocess(resize=4, crop=4).centre_crop


def flatten(batch: Tensor) -> dict[str, Tensor]:
    return {"cls": batch.flatten(1)}


@pytest.mark.parametrize(("k", "batch_size"), [(1, 5), (7, 3), (17, 4), (17, 100)])
def test_batch_by_batch_as_all_at_once(tmp_path: Path, k: int, batch_size: int) -> None:
    write_pictures(tmp_path, 17)
    bank = open_pictures([tmp_path])
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(9, 48), dim=1)
    found = nearest(bank, queries, VIEW, flatten, k=k, here=CPU, batch_size=batch_size, workers=0)
    vectors = torch.stack([VIEW(_open(tmp_path, name)) for name in bank.names]).flatten(1)
    similarity = queries @ F.normalize(vectors, dim=1).T
    expected = similarity.topk(k, dim=1)
    torch.testing.assert_close(found.similarity, expected.values)
    assert torch.equal(found.places, expected.indices)
    labels = torch.arange(17) % 4
    ranked = classify(F.normalize(vectors, dim=1), labels, queries, k=k, classes=4)
    assert torch.equal(vote(found, labels, classes=4), ranked[:, 0])


def _open(folder: Path, name: str):  # type: ignore[no-untyped-def]
    from PIL import Image

    with Image.open(folder / name) as picture:
        return picture.convert("RGB")


def test_votes_weigh_by_nearness() -> None:
    found = Nearest(torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[0, 1, 2]]))
    labels = torch.tensor([0, 1, 1])
    assert vote(found, labels, classes=2).tolist() == [0]
    assert vote(found, labels, classes=2, temperature=10.0).tolist() == [1]


def test_what_is_confused_most() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    taken = torch.tensor([0, 1, 1, 1, 1, 0, 0, 1])
    matrix = confusion_matrix(truth, taken, 3)
    assert matrix.tolist() == [[1, 2, 0], [0, 2, 0], [2, 1, 0]]
    expected = [Confused(0, 1, 2, 3), Confused(2, 0, 2, 3), Confused(2, 1, 1, 3)]
    assert most_confused(matrix, 12) == expected
    assert most_confused(matrix, 1) == expected[:1]
    assert most_confused(torch.eye(3, dtype=torch.long), 5) == []
