"""Processes and their collectives; on one process each of them is the identity."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from training.slurm import slurm_task
from training.tables import ConfigError

_GLOO_PAUSE_S = 0.1
# What gloo, NCCL and the store of addresses say where the other end is no more.
_GONE = re.compile(
    r"(?i)\b(?:connection (?:was likely )?(?:closed|reset)|broken pipe|timed out"
    r"|remote process exited|communicator was aborted)"
)


class ProcessLost(RuntimeError):
    """Another process of the run is gone, or does not answer, so that this one cannot go on."""


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


class Place(NamedTuple):
    """Where the environment says that this process stands; see `place`."""

    rank: int
    size: int
    local_rank: int


def place() -> Place:
    """What torchrun, or SLURM's srun without it, tells this process; else it is the only one.

    Raises:
        ConfigError: variables that make no sense.
    """
    own = os.environ
    if "RANK" in own:
        found = [own.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        if not all(value.isdigit() for value in found):
            raise ConfigError(
                f"RANK, WORLD_SIZE, LOCAL_RANK = {found}: must be whole numbers, as torchrun sets "
                "them; unset RANK for one process"
            )
        return Place(*map(int, found))
    if (task := slurm_task(own)) is not None:
        return Place(task.rank, task.size, task.local_rank)
    return Place(0, 1, 0)


@contextmanager
def world(device: str) -> Iterator[World]:
    """Joins the processes that torchrun or srun started, and leaves at the end.

    What is on the CPU travels by gloo, and what is on CUDA by NCCL. Inside another `world` they
    have joined already, and stay joined at the end: nobody can join anew at the launcher's address.

    Args:
        device: see `choose_device`.

    Raises:
        ConfigError: CUDA was asked for and is not there, or has fewer devices than processes;
            or the launcher's variables make no sense, or the others are not found by them.
        ProcessLost: another process was gone when something inside waited for it.
    """
    chosen = choose_device(device)
    own = place()
    if chosen.type == "cuda":
        chosen = torch.device("cuda", _cuda_index(own.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        return
    if "RANK" not in os.environ and own.size == 1:
        yield World(0, 1, chosen)
        return
    _join(chosen)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        raise ProcessLost(
            f"rank {own.rank} of {own.size} ends, because another process is gone; what that one "
            f"or its launcher said tells why ({_reason(error)})"
        ) from error
    finally:
        # gloo's threads let go of the last collectives' tensors a moment after these have returned,
        # and need the interpreter for it: one that comes too late aborts the process (PyTorch issue
        # 190489). `destroy_process_group` does not wait for them where anything, such as DTensor's
        # caches, still knows the group.
        time.sleep(_GLOO_PAUSE_S)
        dist.destroy_process_group()


def _join(device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None  # named, or NCCL guesses it and warns
    task = None if "RANK" in os.environ else slurm_task(os.environ)
    if task is None:
        dist.init_process_group(backend, device_id=bound)
        return
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{task.address}:{task.port}",
            rank=task.rank,
            world_size=task.size,
            device_id=bound,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ConfigError(
            f"rank {task.rank} of {task.size} finds no others at {task.address}:{task.port}, where "
            "rank 0 listens; MASTER_ADDR and MASTER_PORT set another address and port "
            f"({str(error).splitlines()[0]})"
        ) from error


def _reason(error: RuntimeError) -> str:
    """The first sentence of gloo's or NCCL's words, without the place in their code."""
    return re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].partition("\n")[0]


def _cuda_index(local_rank: int, devices: int) -> int:
    """The device of a node's process; where a launcher shows each process one device, that one."""
    if devices == 1 and "RANK" not in os.environ:
        return 0
    if local_rank >= devices:
        raise ConfigError(
            f"this node has at least {local_rank + 1} processes and {devices} CUDA devices; "
            "start as many processes as devices"
        )
    return local_rank


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


def gather_rows(own: Tensor, here: World) -> Tensor:
    """Each process's rows [n, ...], by rank one after the other, on every process.

    Processes may have different numbers of rows. They travel by the device that `own` lies on.
    """
    if here.size == 1:
        return own
    counts = all_gather_int(len(own), own.device)
    padded = own.new_zeros((max(counts), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()
