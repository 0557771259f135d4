"""What a `Batcher` asks of an encoder; a kind is a task and the shape of its inputs."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from service.encoder import Array, Encoder, Task


def batch_kind(task: Task, prepared: Array) -> Hashable:
    """What must be equal for two inputs to share a forward pass."""
    return task, prepared.shape


def runner(encoder: Encoder) -> Callable[[Any, Sequence[Array], int], list[Array]]:
    """`run` for a `Batcher` of such kinds."""

    def run(kind: tuple[Task, Any], inputs: Sequence[Array], at_once: int) -> list[Array]:
        return encoder.run(kind[0], inputs, at_once=at_once)

    return run


def enough_for(encoder: Encoder) -> Callable[[Any], int]:
    """`enough` for such a `Batcher`."""

    def enough(kind: tuple[Task, tuple[int, ...]]) -> int:
        return encoder.enough(kind[1])

    return enough
