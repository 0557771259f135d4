"""The nearest vectors of a bank that streams past: exact, in memory that does not grow with it."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from training.distributed import World, gather_rows

_BLOCK = 4096
"""Bank vectors that are gathered for one product: enough to keep a matrix product efficient."""
_SIMILARITIES = 2**24
"""That are computed at once: 64 MiB of float32."""
_GROUP = 8
_NOTHING = torch.iinfo(torch.int64).min
_LOW = 2**32 - 1


class Neighbours(NamedTuple):
    """The nearest of each query, best first.

    Attributes:
        similarity: [Q, k] float32.
        places: [Q, k] int64, where in the bank each neighbour stands.
    """

    similarity: Tensor
    places: Tensor

    def cpu(self) -> Self:
        """The same on the CPU."""
        return self._replace(similarity=self.similarity.cpu(), places=self.places.cpu())


class Nearest:
    """The k bank vectors of greatest inner product with each query; cosine, for unit vectors.

    Of equally similar ones the first in the bank are taken: which they are depends neither on how
    the bank was divided into batches nor on how many processes shared it. (Products of equal
    vectors may round differently; then they are not equally similar.)

    Args:
        queries: [Q, D]; they decide on the device.
        k: how many to find.

    Raises:
        ValueError: k is below 1.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        self._queries, self._k = queries.float(), k
        # A neighbour is one number, so that the better is the greater: see `_pack`.
        self._keys = torch.full((len(queries), k), _NOTHING, device=queries.device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, places: Tensor, vectors: Tensor) -> None:
        """Takes in a part of the bank.

        Args:
            places: [B], each below 2**32 and given only once.
            vectors: [B, D].
        """
        device = self._queries.device
        self._waiting.append((places.to(device), vectors.to(device).float()))
        if sum(len(each) for each, _ in self._waiting) >= _BLOCK:
            self._search()

    def found(self) -> Neighbours:
        """The neighbours among what this process was given.

        Raises:
            ValueError: it was given fewer than k vectors.
        """
        self._search()
        return self._unpacked(self._keys)

    def found_by_all(self, here: World) -> Neighbours:
        """The neighbours among what all processes were given, on every process.

        All of them must have the same queries, and call this.

        Raises:
            ValueError: together they were given fewer than k vectors.
        """
        self._search()
        merged = []
        for chunk in torch.split(self._keys, max(1, _SIMILARITIES // (2 * self._k * here.size))):
            by_process = gather_rows(chunk, here).reshape(here.size, len(chunk), self._k)
            merged.append(_best(by_process.transpose(0, 1).flatten(1), self._k))
        return self._unpacked(torch.cat(merged))

    def _search(self) -> None:
        if not self._waiting:
            return
        places, vectors = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        if not len(places):
            return
        rows = max(1, _SIMILARITIES // len(places))
        for queries, keys in zip(
            torch.split(self._queries, rows), torch.split(self._keys, rows), strict=True
        ):
            keys.copy_(
                _best(torch.cat((keys, self._keys_of(queries, places, vectors)), 1), self._k)
            )

    def _keys_of(self, queries: Tensor, places: Tensor, vectors: Tensor) -> Tensor:
        """The best keys of one block, [chunk, at most k]."""
        similarity = queries @ vectors.T
        k, count = self._k, len(places)
        if count <= k:
            return _pack(similarity, places)
        values, columns = _top(similarity, k + 1)
        keys = _pack(values[:, :k], places[columns[:, :k]])
        # Which of equals `topk` takes is chance, so where the last one in equals the first one out
        # the keys of the whole row decide. That is rare, and they take four times as long.
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        for some in torch.split(tied, max(1, _SIMILARITIES // (4 * count))):
            keys[some] = _best(_pack(similarity[some], places), k)
        return keys

    def _unpacked(self, keys: Tensor) -> Neighbours:
        if keys.numel() and int(keys.min()) == _NOTHING:
            raise ValueError(f"k is {self._k}; the bank holds fewer vectors")
        return Neighbours(_float_of((keys >> 32).int()), _LOW - (keys & _LOW))


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `topk` of each row, four times as fast: the k greatest lie in the k greatest groups."""
    count = similarity.shape[1]
    groups = count // _GROUP
    if groups < 2 * k:
        values, columns = similarity.topk(k)
        return values, columns
    grouped = groups * _GROUP  # group g is the columns g, g + groups, g + 2 * groups, ...
    best = similarity[:, :grouped].reshape(-1, _GROUP, groups).amax(dim=1).topk(k).indices
    steps = torch.arange(0, grouped, groups, device=similarity.device)
    rest = torch.arange(grouped, count, device=similarity.device).expand(len(similarity), -1)
    columns = torch.cat(((best[:, :, None] + steps).flatten(1), rest), dim=1)
    values, at = similarity.gather(1, columns).topk(k)
    return values, columns.gather(1, at)


def _best(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1])).values


def _pack(similarity: Tensor, places: Tensor) -> Tensor:
    """One int64 each: the similarity's order in the upper half, and below, earlier places first."""
    return (_ordered(similarity).long() << 32) + (_LOW - places)


def _ordered(values: Tensor) -> Tensor:
    """float32 -> int32 in the same order: a negative float's bits grow with its size."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float_of(ordered: Tensor) -> Tensor:
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
