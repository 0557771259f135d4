"""How much memory a training step takes, found without any: by running it on tensors of no data.

One step, forward and backward, runs on PyTorch's "meta" device, where tensors have shapes and no
contents, and every storage that comes and goes is counted. So the estimate follows the networks
and the loss as they are written: crops, head, checkpointed blocks.

Two things are put in place of what only a GPU does: autocast, which knows no meta device, and the
fused attention, which keeps no T x T matrix.

In fp32 on the CPU the estimate is about 5% above what PyTorch's profiler counts in a real step
(ViT-Ti/16, 2 + 2 crops). On CUDA, expect more: what kernels and libraries need in passing, and
what the allocator cannot reuse.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPTIMIZER_STATES: Mapping[str, int] = {"adamw": 2, "sgd": 1, "lars": 1}
"""Tensors that an optimizer keeps for each trained parameter, each of its size."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one process's device.

    Attributes:
        weights: student and teacher, buffers included.
        optimizer: its states.
        step: gradients and activations together, at the moment when they are the most.
    """

    weights: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        """All of it, but the framework's own (0.5 to 1 GB on CUDA) and its allocator's waste."""
        return self.weights + self.optimizer + self.step


def estimate(
    student: nn.Module,
    teacher: nn.Module,
    forward: Callable[[], Tensor],
    *,
    optimizer: str,
    autocast: torch.dtype | None,
) -> Memory:
    """The memory of one training step, on one process or on each of several that share it by DDP.

    Parameters in shards (FSDP) take less than is told here.

    Args:
        student, teacher: networks on the meta device.
        forward: gives the loss of one batch on the meta device; it makes its crops itself, so
            that they are counted.
        optimizer: "adamw", "sgd" or "lars".
        autocast: the precision of the step; None is fp32.
    """
    trained = sum(_bytes(p) for p in student.parameters() if p.requires_grad)
    count = _Count(_storages(student, teacher))
    with count, _OnGpu(autocast):
        _backward(forward())
    student.zero_grad()
    held = {id(s): s.nbytes() for s in _storages(student, teacher)}
    return Memory(
        weights=sum(held.values()),
        optimizer=OPTIMIZER_STATES[optimizer] * trained,
        step=count.peak,
    )


def _backward(loss: Tensor) -> None:
    """loss.backward() by the engine itself.

    The method is a function to `_OnGpu`, which is switched off within each that it handles: blocks
    that are recomputed would come out other than they were.
    """
    run = torch.autograd.Variable._execution_engine.run_backward
    start = (torch.ones_like(loss),)
    run((loss,), start, False, False, (), allow_unreachable=True, accumulate_grad=True)


class _Count(TorchDispatchMode):
    """Counts the bytes of all storages that are made in it, as long as each lives."""

    def __init__(self, known: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = {id(storage): 0 for storage in known}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # a storage has one Python object for all its life
        if key not in self._live:
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._remove, key)
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)

    def _remove(self, key: int) -> None:
        self._now -= self._live.pop(key)


class _Attention(torch.autograd.Function):
    """What a fused attention makes and keeps: its inputs, its output, and a number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_rest = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_LOWERED = (F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.Tensor.__matmul__)
_RAISED = (F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax)


class _OnGpu(TorchFunctionMode):
    """Casts as CUDA's autocast does, and attends as its fused kernels do."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*(self._lower(each) for each in args[:3]))
        if self._dtype is not None and func in _LOWERED:
            args = tuple(self._lower(each) for each in args)
            kwargs = {key: self._lower(each) for key, each in kwargs.items()}
        if self._dtype is not None and func in _RAISED:
            args = tuple(each.float() if isinstance(each, Tensor) else each for each in args)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if self._dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self._dtype)
        if id(value) not in self._weights:  # autocast keeps the casts of weights
            self._weights[id(value)] = value.to(self._dtype)
        return self._weights[id(value)]


def _storages(*networks: nn.Module) -> list[torch.UntypedStorage]:
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    return [tensor.untyped_storage() for tensor in tensors]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
