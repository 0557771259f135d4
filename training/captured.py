"""A training step as one CUDA graph: the host starts it with a single call instead of thousands.

A step of a small network takes the host longer to start, kernel by kernel, than the device to do
(docs/benchmarks.md). What changes from step to step lies in tensors that keep their place: crops,
rates, the choices of stochastic depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from backbone.stochastic_depth import draw_factors
from backbone.vit import VisionTransformer
from training.config import Recipe
from training.dino import by_size
from training.distributed import World
from training.rates import Rates
from training.state import Training

T = TypeVar("T")

_WARM_UP = 3
"""Steps done before one is captured: they compile what is compiled, and make optimizer states."""


def can_capture(recipe: Recipe, here: World) -> bool:
    """Whether a run's steps may be captured: one GPU, a ViT, AdamW and a teacher by EMA."""
    return (
        recipe.cuda_graph
        and here.device.type == "cuda"
        and here.size == 1
        and recipe.architecture.has_attention
        and recipe.optimizer.name == "adamw"
        and recipe.teacher.kind == "ema"
    )


class CapturedStep(Generic[T]):
    """Does what `step` does, from its fourth call on as a CUDA graph.

    The graph is captured anew where crops of other shapes come, or the last layer thaws.

    Args:
        training: what `step` trains.
        step: a `train_step` of batches of crops and rates.
    """

    def __init__(self, training: Training, step: Callable[..., T]) -> None:
        self._training, self._step = training, step
        self._kind: object = None
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T

    def __call__(
        self, batches: Sequence[Sequence[Tensor]], rates: Rates, *, ends_epoch: bool = False
    ) -> T:
        """See `train_step`. What it returns is written over by the next step."""
        kind = (rates.last_layer_frozen, [[crop.shape for crop in crops] for crops in batches])
        if kind != self._kind:
            self._kind, self._warm, self._graph = kind, 0, None
        if self._warm < _WARM_UP:
            self._warm += 1
            return self._step(batches, rates, ends_epoch=ends_epoch)
        if self._graph is None:
            self._graph = self._capture(batches, rates)
        self._put(batches, rates)
        self._graph.replay()
        return self._result

    def _capture(self, batches: Sequence[Sequence[Tensor]], rates: Rates) -> torch.cuda.CUDAGraph:
        with torch.random.fork_rng(devices=[]):  # the step's own choices are yet to be drawn
            return self._captured(batches, rates)

    def _captured(self, batches: Sequence[Sequence[Tensor]], rates: Rates) -> torch.cuda.CUDAGraph:
        self._crops = [[torch.empty_like(crop) for crop in crops] for crops in batches]
        self._rates = torch.zeros(4, device=batches[0][0].device)
        self._factors = [drawn.to(self._rates.device) for drawn in self._draw(batches)]
        lr, decay, momentum, temperature = self._rates.unbind()
        of_graph = replace(
            rates,
            lr=lr,
            weight_decay=decay,
            teacher_momentum=momentum,
            teacher_temperature=temperature,
        )
        groups = self._training.optimizer.param_groups
        before = [(group["lr"], group["weight_decay"], group["capturable"]) for group in groups]
        self._training.optimizer.zero_grad()  # the graph's own gradients lie in its memory
        self._put(batches, rates)  # real numbers, where a kernel is chosen by trying
        backbone = self._training.student.backbone
        if isinstance(backbone, VisionTransformer):
            backbone.drawn = list(self._factors)
        graph = torch.cuda.CUDAGraph()
        for group in groups:
            group["capturable"] = True
        # Loaders' threads pin memory meanwhile, which "global" forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self._step(self._crops, of_graph)
        for group, old in zip(groups, before, strict=True):
            group["lr"], group["weight_decay"], group["capturable"] = old
        return graph

    def _put(self, batches: Sequence[Sequence[Tensor]], rates: Rates) -> None:
        """Everything that a step depends on goes to where the graph reads it."""
        numbers = [
            rates.lr,
            rates.weight_decay,
            rates.teacher_momentum,
            rates.teacher_temperature,
        ]
        self._rates.copy_(torch.tensor(numbers).pin_memory(), non_blocking=True)
        for place, drawn in zip(self._factors, self._draw(batches), strict=True):
            place.copy_(drawn.pin_memory(), non_blocking=True)
        for places, crops in zip(self._crops, batches, strict=True):
            torch._foreach_copy_(places, list(crops))

    def _draw(self, batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Stochastic depth's factors of the student's forwards, on the CPU."""
        backbone = self._training.student.backbone
        if not isinstance(backbone, VisionTransformer) or not any(backbone.drop_path_rates):
            return []
        return [
            draw_factors(
                backbone.drop_path_rates,
                [(sum(len(crop) for crop in group), 0) for group in by_size(crops)],
            )
            for crops in batches
        ]
