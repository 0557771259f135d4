import pytest
import torch.nn.functional as F

from tests.golden.conftest import Golden
from training.evaluation.knn import accuracy, classify


def test_top1_and_top5(golden: Golden) -> None:
    settings, tensors = golden["knn"], golden.tensors("evaluation")
    bank, queries = (F.normalize(tensors[f"{part}_features"], dim=1) for part in ("train", "test"))
    for k, (top1, top5) in settings["top1_top5_percent"].items():
        ranked = classify(
            bank,
            tensors["train_labels"],
            queries,
            k=int(k),
            classes=settings["num_classes"],
            temperature=settings["temperature"],
        )
        result = accuracy(ranked, tensors["test_labels"])
        assert (result["top1"], result["top5"]) == (pytest.approx(top1), pytest.approx(top5))
