"""Labels passed on between patches, against the definition written out in full."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.evaluation.videos import true_mask
from training.evaluation import label_propagation
from training.evaluation.davis import Indices
from training.evaluation.label_propagation import (
    Propagation,
    propagate,
    to_labels,
    to_mask,
    track,
)


def by_definition(target: Tensor, context: Tensor, labels: Tensor, s: Propagation) -> Tensor:
    """The whole affinity of every patch with every patch of every frame, one by one."""
    n, h, w, _ = context.shape
    found = torch.zeros(h, w, labels.shape[-1])
    for y in range(h):
        for x in range(w):
            affinity = torch.zeros(n, h, w)
            for f in range(n):
                for v in range(h):
                    for u in range(w):
                        if s.radius == 0 or max(abs(v - y), abs(u - x)) <= s.radius:
                            affinity[f, v, u] = torch.exp(
                                target[y, x] @ context[f, v, u] / s.temperature
                            )
            weakest = affinity.flatten().topk(s.topk).values.min()
            affinity[affinity < weakest] = 0
            found[y, x] = torch.einsum("fvu,fvuc->c", affinity / affinity.sum(), labels)
    return found


@pytest.mark.parametrize("radius", [0, 1, 2, 12])
def test_propagation_is_that_of_the_definition(radius: int) -> None:
    generator = torch.Generator().manual_seed(radius)
    n, h, w = 3, 6, 5  # two strips, the second of them shorter
    target = F.normalize(torch.randn(h, w, 7, generator=generator), dim=-1)
    context = F.normalize(torch.randn(n, h, w, 7, generator=generator), dim=-1)
    labels = torch.rand(n, h, w, 3, generator=generator)
    settings = Propagation(radius=radius)
    expected = by_definition(target, context, labels, settings)
    torch.testing.assert_close(propagate(target, context, labels, settings), expected)


def test_more_neighbours_than_there_are_patches() -> None:
    target = F.normalize(torch.ones(1, 2, 4), dim=-1)
    labels = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    found = propagate(target, target[None], labels, Propagation(topk=5))
    torch.testing.assert_close(found, torch.full((1, 2, 2), 0.5))
    found = propagate(target, target[None], labels, Propagation(topk=2, radius=0))
    torch.testing.assert_close(found, torch.full((1, 2, 2), 0.5))


@pytest.mark.parametrize(
    ("last_frames", "seen"),
    [(2, [[0], [0, 1], [0, 1, 2], [0, 2, 3]]), (0, [[0], [0], [0], [0]])],
)
def test_labels_come_from_the_first_frame_and_the_last_few(
    last_frames: int, seen: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def spy(target: Tensor, context: Tensor, labels: Tensor, settings: Propagation) -> Tensor:
        asked.append(context[:, 0, 0, 0].tolist())
        assert labels[:, 0, 0, 0].tolist() == asked[-1]  # each frame with the labels found for it
        return target

    monkeypatch.setattr(label_propagation, "propagate", spy)
    frames = [torch.full((1, 1, 1), float(i)) for i in range(5)]
    found = list(track(frames, frames[0], Propagation(last_frames=last_frames)))
    assert asked == seen
    assert [each.item() for each in found] == [1, 2, 3, 4]


def test_a_square_that_moves_one_patch_a_frame_is_followed() -> None:
    def frame(left: int) -> Tensor:
        numbers = torch.arange(64).reshape(8, 8)  # every place looks different
        numbers[3:5, left : left + 2] = torch.tensor([[64, 65], [66, 67]])
        return F.one_hot(numbers, 68).float()

    first = to_labels(_square(1), objects=1, grid=(8, 8))
    found = list(track(map(frame, range(1, 6)), first, Propagation(topk=1, temperature=0.01)))
    for left, labels in zip(range(2, 6), found, strict=True):
        mask = to_mask(labels, patch_size=1, size=(8, 8))
        assert (mask[3:5, left : left + 2] == 1).all()


def _square(left: int) -> Indices:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[3:5, left : left + 2] = 1
    return mask


def test_masks_and_labels_and_back() -> None:
    mask = true_mask(0)
    mask[60:90, 80:120] = 2
    labels = to_labels(mask, objects=3, grid=(12, 16))
    assert labels.shape == (12, 16, 4)
    assert torch.equal(labels.sum(dim=-1), torch.ones(12, 16))
    found = to_mask(labels, patch_size=8, size=(128, 96))
    assert found.shape == mask.shape
    assert set(found.flatten().tolist()) == {0, 1, 2}  # the third object has no pixel
    assert (found == mask).mean() > 0.93


def test_a_label_that_is_the_same_everywhere_stays() -> None:
    labels = torch.zeros(4, 4, 3)
    labels[..., 1] = 1.0
    assert (to_mask(labels, patch_size=2, size=(8, 8)) == 1).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("last_frames", -1), ("radius", -1), ("topk", 0), ("temperature", 0.0),
     ("temperature", float("nan"))],
)  # fmt: skip
def test_settings_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        replace(Propagation(), **{field: value})
