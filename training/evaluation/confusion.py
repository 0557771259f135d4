"""What the k-NN takes for what, and the neighbours that make it so."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distributed import World, gather_rows
from training.evaluation.features import Embed, View, stream
from training.evaluation.knn import TEMPERATURE
from training.sources import Pictures

_QUERIES = 4096  # whose similarities to a batch are computed at once


class Nearest(NamedTuple):
    """The k nearest of each query, nearest first, both [Q, k].

    Attributes:
        similarity: cosines.
        places: which pictures of the bank.
    """

    similarity: Tensor
    places: Tensor


class Confused(NamedTuple):
    """How many of a class's `of` queries were taken for another class."""

    truth: int
    taken_for: int
    times: int
    of: int


def nearest(
    bank: Pictures,
    queries: Tensor,
    view: View,
    embed: Embed,
    *,
    k: int,
    here: World,
    batch_size: int = 256,
    workers: int = 2,
) -> Nearest:
    """The nearest pictures of `bank`, whose vectors are made and forgotten batch by batch.

    Every process reads its share of the bank and gets the whole answer.

    Args:
        queries: L2-normalised [Q, D], on the device.
        k: at most the bank's size.

    Raises:
        DataError: a picture that cannot be read.
    """
    similarity = torch.full((len(queries), k), -torch.inf, device=queries.device)
    places = torch.zeros_like(similarity, dtype=torch.long)
    for at, found in stream(
        bank, view, embed, here=here, batch_size=batch_size, workers=workers, title="neighbours"
    ):
        vectors, where = F.normalize(found["cls"], dim=1), at.to(queries.device)
        for first in range(0, len(queries), _QUERIES):
            part = slice(first, first + _QUERIES)
            cosines = queries[part] @ vectors.T
            both = torch.cat((similarity[part], cosines), dim=1)
            known = torch.cat((places[part], where.expand(len(cosines), -1)), dim=1)
            similarity[part], chosen = both.topk(k, dim=1)
            places[part] = known.gather(1, chosen)
    each = gather_rows(similarity[None], here).movedim(0, 1).flatten(1)
    known = gather_rows(places[None], here).movedim(0, 1).flatten(1)
    best, chosen = each.topk(k, dim=1)
    return Nearest(best, known.gather(1, chosen))


def vote(
    found: Nearest, labels: Tensor, *, classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """The class of each query [Q] by the weighted vote of its neighbours; see `knn.classify`."""
    votes = found.similarity.new_zeros(len(found.places), classes)
    labels = labels.to(found.places.device)
    votes.scatter_add_(1, labels[found.places], (found.similarity / temperature).exp())
    return votes.argmax(dim=1)


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
