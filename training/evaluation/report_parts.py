"""What the report shows beside figures, before it is drawn: attention, neighbours, confusion."""

import random
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from training.decoding import decode
from training.evaluation import knn
from training.evaluation.command import Session
from training.evaluation.confusion import confusion_matrix
from training.evaluation.features import embedder, extract, stream
from training.evaluation.jaccard import cls_attention, default_size, view_of
from training.evaluation.labelled import Labelled
from training.evaluation.nearest import Neighbours
from training.sources import Pictures, every

T = TypeVar("T")

K = 20
NEIGHBOURS = 5


class Part(NamedTuple, Generic[T]):
    """One part of the page.

    Attributes:
        name: what the page calls it.
        found: None where there is nothing to show, or it failed.
        error: why it failed; None where it did not.
        table: what its command printed.
    """

    name: str
    found: T | None
    error: str | None = None
    table: str = ""


class Attention(NamedTuple):
    """A picture and each head's map of it, [A, h, w]."""

    picture: Image.Image
    maps: npt.NDArray[np.float32]


class Neighbour(NamedTuple):
    """A picture with its class, whether that is right, and how near it is to its query."""

    picture: Image.Image
    label: str
    right: bool
    similarity: float | None = None


class Row(NamedTuple):
    """A query, which is right where the k-NN is, and its nearest neighbours."""

    query: Neighbour
    neighbours: list[Neighbour]


class Confusion(NamedTuple):
    """The k-NN's answers.

    Attributes:
        classes: names, C of them.
        matrix: how often each class [rows] was taken for each [columns], [C, C].
        k: how many neighbours voted.
        rows: of a few queries.
    """

    classes: Sequence[str]
    matrix: Tensor
    k: int
    rows: list[Row]


@torch.inference_mode()
def look_at(pictures: Pictures, count: int, own: Session) -> list[Attention]:
    """Attention to `count` of the pictures, or as many as there are, evenly spaced.

    Raises:
        DataError: a picture that cannot be read.
    """
    artifact, some = own.artifact, every(pictures, count)
    network = artifact.network().to(own.here.device)
    view = view_of(artifact, default_size(artifact))
    found = []
    for i, name in enumerate(some.names):
        picture = decode(some.read(i), name)
        one = view(picture)[None].to(own.here.device)
        heads = cls_attention(network, one, own.here.device, own.precision)[0]
        columns = one.shape[-1] // artifact.architecture.patch_size
        maps = heads.reshape(len(heads), -1, columns).cpu().numpy()
        found.append(Attention(picture, maps))
    return found


def ask(
    train: Labelled, val: Labelled, own: Session, *, queries: int, seed: int
) -> Confusion | None:
    """The k-NN of `val` against `train`, k = 20 or all there are; every process must call it.

    Args:
        queries: how many, drawn by `seed`, are shown with their neighbours.

    Returns:
        None on all processes but the first.

    Raises:
        DataError: a picture that cannot be read.
    """
    here, view = own.here, own.artifact.preprocess.centre_crop
    embed = embedder(own.artifact, here.device, precision=own.precision)
    k = min(K, len(train.labels))
    vectors = extract(
        val.pictures,
        view,
        embed,
        here=here,
        batch_size=own.batch_size,
        workers=own.workers,
        title="queries",
    )["cls"]
    bank = stream(
        train.pictures,
        view,
        embed,
        here=here,
        batch_size=own.batch_size,
        workers=own.workers,
        title="neighbours",
    )
    found = knn.neighbours({"cls": vectors}, bank, k=k, here=here)["cls"].cpu()
    voters = train.labels[found.places]
    taken_for = knn.vote(found.similarity, voters, classes=len(train.classes))[:, 0]
    if not here.is_main:
        return None
    count = min(queries, len(val.labels))
    chosen = random.Random(seed).sample(range(len(val.labels)), count)
    return Confusion(
        classes=train.classes,
        matrix=confusion_matrix(val.labels, taken_for, len(train.classes)),
        k=k,
        rows=[_row(i, train, val, found, int(taken_for[i])) for i in chosen],
    )


def _row(query: int, train: Labelled, val: Labelled, found: Neighbours, taken_for: int) -> Row:
    label = int(val.labels[query])

    def tile(of: Labelled, i: int, right: bool, similarity: float | None = None) -> Neighbour:
        picture = decode(of.pictures.read(i), of.pictures.names[i])
        return Neighbour(picture, of.classes[int(of.labels[i])], right, similarity)

    cosines, places = (part[query, :NEIGHBOURS].tolist() for part in found)
    return Row(
        tile(val, query, taken_for == label),
        [
            tile(train, place, int(train.labels[place]) == label, cosine)
            for cosine, place in zip(cosines, places, strict=True)
        ],
    )
