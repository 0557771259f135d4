"""Pictures in class folders, as evaluations want them: checked, with their classes as numbers."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.sources import DataError, Pictures, class_labels, open_pictures


class Labelled(NamedTuple):
    """Pictures and the class of each.

    Attributes:
        pictures: the pictures.
        labels: [N], numbers in `classes`.
        classes: the names of the class folders, sorted.
    """

    pictures: Pictures
    labels: Tensor
    classes: list[str]


def open_train_and_val(
    train: Sequence[str], val: Sequence[str], *, least: int = 2
) -> tuple[Labelled, Labelled]:
    """Opens class folders, or tars of them, to learn from and to test on.

    Raises:
        DataError: nothing to read; or see `train_and_val`.
    """
    return train_and_val(open_pictures(train), open_pictures(val), least=least)


def train_and_val(
    bank: Pictures, queries: Pictures, *, least: int = 2
) -> tuple[Labelled, Labelled]:
    """Pictures to learn from and to test on, both with the classes of the first.

    Args:
        least: how many pictures each class of `bank` must have.

    Raises:
        DataError: pictures outside class folders, a class of `bank` with fewer pictures than
            `least`, or one of `queries` that `bank` lacks; names folder and rule.
    """
    known = class_labels(bank, where="--train")
    asked = class_labels(queries, where="--val")
    check_class_sizes(bank, known, least=least, where="--train")
    if absent := sorted(set(asked) - set(known)):
        name = queries.names[asked.index(absent[0])]
        raise DataError(
            f"--val has {len(absent)} {_classes(len(absent))} that --train lacks, e.g. "
            f"{absent[0]!r} of {name!r}; --train has {len(set(known))}, e.g. {min(known)!r}: class "
            "folders must have the same names in both"
        )
    classes, (bank_labels, query_labels) = class_indices(known, asked)
    return Labelled(bank, bank_labels, classes), Labelled(queries, query_labels, classes)


def check_class_sizes(pictures: Pictures, labels: Sequence[str], *, least: int, where: str) -> None:
    """Refuses classes with fewer pictures than `least`.

    Raises:
        DataError: names the class, one of its pictures, and the rule.
    """
    counts = Counter(labels)
    few = sorted(label for label, count in counts.items() if count < least)
    if few:
        name, count = pictures.names[labels.index(few[0])], counts[few[0]]
        found = f"{count} picture" + ("s" if count > 1 else "")
        more = len(few) - 1
        others = f", and {more} other {_classes(more)} too few" if more else ""
        raise DataError(
            f"class {few[0]!r} in {where} has {found} ({name!r}){others}; "
            f"each class needs at least {least}"
        )


def class_indices(*labels: Sequence[str]) -> tuple[list[str], list[Tensor]]:
    """The sorted classes of several lists of labels, and each list as indices into them."""
    classes = sorted(set().union(*labels))
    index = {name: i for i, name in enumerate(classes)}
    return classes, [torch.tensor([index[name] for name in part]) for part in labels]


def _classes(count: int) -> str:
    return "class" if count == 1 else "classes"
