"""Processes and their collectives; on one process each of them is the identity."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import ConfigError


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0


def choose_device(device: str) -> torch.device:
    """The device that "cpu", "cuda" or "auto" (CUDA where there is one) names.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no CUDA device here; use 'cpu'")
    return torch.device(device)


@contextmanager
def world(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started (NCCL on CUDA, else gloo), and leaves at the end.

    Args:
        device: see `choose_device`.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    place = choose_device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    if "RANK" not in os.environ:
        yield World(0, 1, place)
        return
    if place.type == "cuda":
        dist.init_process_group("nccl", device_id=place)  # named, or NCCL guesses it and warns
    else:
        dist.init_process_group("gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


class Reduction:
    """A mean over processes that is on its way; see `reduce_mean`."""

    def __init__(self, value: Tensor, work: dist.Work | None) -> None:
        self._value = value
        self._work = work

    def wait(self) -> Tensor:
        """The mean, once it is there. On CUDA the stream waits, not the host."""
        if self._work is None:
            return self._value
        self._work.wait()
        return self._value / dist.get_world_size()


def reduce_mean(value: Tensor) -> Reduction:
    """Starts the mean of each process's `value`, and returns at once."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Reduction(value, None)
    value = value.clone()
    return Reduction(value, dist.all_reduce(value, async_op=True))


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of each process's `value`, on every process."""
    return _all_reduce(value, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """The greatest of each process's `value`, element by element, on every process."""
    return _all_reduce(value, dist.ReduceOp.MAX)


def _all_reduce(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, operation)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of each process's `value`, on every process."""
    return reduce_mean(value).wait()


def all_gather_int(value: int, device: torch.device) -> list[int]:
    """Each process's `value`, by rank, on every process."""
    own = torch.tensor([value], device=device)
    if not dist.is_initialized():
        return [value]
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return [int(each.item()) for each in found]


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()
