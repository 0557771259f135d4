import pytest
import torch
import torch.nn.functional as F

from tests.golden.conftest import Golden
from training.distributed import World
from training.evaluation.knn import accuracy, classify, neighbours, scores

CPU = World(0, 1, torch.device("cpu"))


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


def test_top1_and_top5_of_a_bank_that_streams_past(golden: Golden) -> None:
    settings, tensors = golden["knn"], golden.tensors("evaluation")
    bank, ks = tensors["train_features"], [int(k) for k in settings["top1_top5_percent"]]
    batches = ((at, {"cls": bank[at]}) for at in torch.arange(len(bank)).split(17))
    found = neighbours({"cls": tensors["test_features"]}, batches, k=max(ks), here=CPU)
    results = scores(
        found["cls"],
        tensors["train_labels"],
        tensors["test_labels"],
        ks=ks,
        classes=settings["num_classes"],
        temperature=settings["temperature"],
    )
    for k, (top1, top5) in settings["top1_top5_percent"].items():
        assert results[k] == {"top1": pytest.approx(top1), "top5": pytest.approx(top5)}
