"""What the k-NN takes for what."""

from typing import NamedTuple

import torch
from torch import Tensor


class Confused(NamedTuple):
    """How many of a class's `of` queries were taken for another class."""

    truth: int
    taken_for: int
    times: int
    of: int


def confusion_matrix(truth: Tensor, taken_for: Tensor, classes: int) -> Tensor:
    """How often each class [rows] was taken for each [columns]: [classes, classes]."""
    return torch.bincount(truth * classes + taken_for, minlength=classes**2).reshape(
        classes, classes
    )


def most_confused(matrix: Tensor, most: int) -> list[Confused]:
    """The pairs of classes that are confused most often, at most `most` of them."""
    wrong = matrix.clone().fill_diagonal_(0)
    # Stable, so that equal counts come in the order of the classes.
    times, places = wrong.flatten().sort(descending=True, stable=True)
    found = []
    for time, place in zip(times[:most].tolist(), places[:most].tolist(), strict=True):
        truth, taken_for = divmod(place, len(matrix))
        if time:
            found.append(Confused(truth, taken_for, time, int(matrix[truth].sum())))
    return found
