"""A training step as one CUDA graph: the host starts it with a single call instead of thousands.

A step of a small network takes the host longer to start, kernel by kernel, than the device to do
(docs/benchmarks.md). What changes from step to step lies in tensors that keep their place: crops,
rates, the choices of stochastic depth; and weights, optimizer states, centre and the head's rows,
which are updated in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from backbone.stochastic_depth import draw_factors
from backbone.vit import VisionTransformer
from training.config import ConfigError, Recipe
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
        """See `train_step`. What it returns is written over by the next step.

        Args:
            batches: as many as `accumulation`, each a list of crops [B, C, H, W] on the device.
            rates: numbers; the graph gets them on the device.

        Raises:
            ConfigError: the step cannot be captured here; `cuda_graph = false` does without.
        """
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
        for group in self._groups:  # for snapshots: the graph reads its own
            group["lr"] = rates.lr
        self._groups[0]["weight_decay"] = rates.weight_decay
        return self._result

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._training.optimizer.param_groups

    def _capture(self, batches: Sequence[Sequence[Tensor]], rates: Rates) -> torch.cuda.CUDAGraph:
        backbone = self._training.student.backbone
        assert isinstance(backbone, VisionTransformer)
        device = batches[0][0].device
        self._crops = [[torch.empty_like(crop) for crop in crops] for crops in batches]
        self._numbers = torch.zeros(4, dtype=torch.float64, device=device)
        with torch.random.fork_rng(devices=[]):  # the step's own choices are yet to be drawn
            self._factors = [drawn.to(device) for drawn in self._draw(batches)]
            self._put(batches, rates)  # real numbers, where a kernel is chosen by trying
        self._training.optimizer.zero_grad()  # the graph's own gradients lie in its memory
        networks = (self._training.student, self._training.teacher)
        last = [network.head.last_layer for network in networks]
        self._rows = [layer and layer.rows for layer in last]  # must not go before the graph does
        graph = torch.cuda.CUDAGraph()
        before = [dict(group) for group in self._groups]
        backbone.drawn = list(self._factors)
        for group in self._groups:
            group["capturable"] = True
        try:
            # Loaders' threads pin memory meanwhile, which "global" forbids.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self._step(self._crops, rates.on_device(self._numbers))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"cuda_graph = true: this step cannot be captured ({reason}); take "
                "cuda_graph = false"
            ) from error
        finally:
            backbone.drawn = []
            for group, old in zip(self._groups, before, strict=True):
                group.update({name: old[name] for name in ("lr", "weight_decay", "capturable")})
        return graph

    def _put(self, batches: Sequence[Sequence[Tensor]], rates: Rates) -> None:
        """Everything that a step depends on goes to where the graph reads it."""
        self._numbers.copy_(rates.numbers().pin_memory(), non_blocking=True)
        for place, drawn in zip(self._factors, self._draw(batches), strict=True):
            place.copy_(drawn.pin_memory(), non_blocking=True)
        for places, crops in zip(self._crops, batches, strict=True):
            torch._foreach_copy_(places, list(crops))

    def _draw(self, batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Stochastic depth's factors of the student's forwards, on the CPU, in their order."""
        backbone = self._training.student.backbone
        assert isinstance(backbone, VisionTransformer)
        if not any(backbone.drop_path_rates):
            return []
        # How many tokens a picture has does not matter to what is drawn.
        groups = [
            [(sum(len(crop) for crop in group), 0) for group in by_size(crops)] for crops in batches
        ]
        return [draw_factors(backbone.drop_path_rates, each) for each in groups]
