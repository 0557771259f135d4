"""Views of pictures from worker processes, which have ended before a bad picture is an error.

An exception that a loader hands on from a worker keeps the loader's iterator alive, and so the
workers: they would be waited for at the process's end, a minute long (`training.signals`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.sources import DataError

Key = TypeVar("Key")


class Views(Dataset[Any], Generic[Key]):
    """What `make` makes of a key: a place and a view; or the message of its `DataError`."""

    def __init__(self, make: Callable[[Key], tuple[int, Tensor]], count: int = 0) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: Key) -> tuple[int, Tensor] | str:
        try:
            return self._make(key)
        except DataError as error:
            return str(error)


def side_by_side(samples: Sequence[tuple[int, Tensor] | str]) -> tuple[Tensor, Tensor] | str:
    """A loader's `collate_fn`: places [B] and views [B, ...], or the first message among them."""
    views = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        views.append(sample)
    places = torch.tensor([place for place, _ in views], dtype=torch.int64)
    return places, torch.stack([view for _, view in views]) if views else torch.empty(0)


def batches(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches of places and views.

    Raises:
        DataError: a picture that cannot be read; the workers have ended then.
    """
    message = ""
    for batch in loader:
        if isinstance(batch, str):
            message = batch
            break  # lets go of the loader's iterator, which ends the workers
        yield batch
    if message:
        raise DataError(message)
