"""An encoder without a network: vectors are pixels, so what looks alike is found."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from fastapi import FastAPI
from PIL import Image

from service.app import create_app, make_model
from service.encoder import Array, ModelInfo, Task
from service.models import Models
from service.settings import Settings

PATIENCE_S = 60.0  # longest wait for an event that is bound to come; ends a test that would hang


class FakeEncoder:
    """See `service.encoder.Encoder`. CLS is a 4 x 4 miniature, attention is brightness.

    Attributes:
        calls: (task, number of pictures) of every call of `run` since the last `calls.clear()`.
        failure: raised by `run` while it is set.
    """

    cell = 4

    def __init__(self, name: str = "fake", fingerprint: str = "f" * 16) -> None:
        self.info = ModelInfo(
            name=name,
            fingerprint=fingerprint,
            architecture="fake/4",
            embedding_size=48,
            copy_embedding_size=96,
            input_size=16,
            patch_size=4,
            heads=2,
            picture_mode="RGB",
            licence="CC0-1.0",
        )
        self.calls: list[tuple[Task, int]] = []
        self.failure: Exception | None = None
        self._model = _Gate()
        self._decoding = _Gate()

    def prepare(self, task: Task, picture: Image.Image) -> Array:
        self._decoding.go_through()
        width, height = picture.size
        if task == "attention":
            shape = (max(1, min(64, width // self.cell)), max(1, min(64, height // self.cell)))
        else:
            shape = (4, 4)
        pixels = np.asarray(picture.resize(shape, Image.Resampling.BOX), dtype=np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def run(self, task: Task, inputs: Sequence[Array]) -> list[Array]:
        self.calls.append((task, len(inputs)))
        self._model.go_through()
        if self.failure is not None:
            raise self.failure
        return [self._result(task, one) for one in inputs]

    def similarity(self, cls: Array) -> Array:
        return cls

    @contextmanager
    def busy(self) -> Iterator["_Gate"]:
        """Until the block ends, or `open` is called, `run` does not return."""
        with self._model.closed() as gate:
            yield gate

    @contextmanager
    def slow_decoding(self) -> Iterator["_Gate"]:
        """Until the block ends, or `open` is called, `prepare` does not return."""
        with self._decoding.closed() as gate:
            yield gate

    @staticmethod
    def _result(task: Task, pixels: Array) -> Array:
        if task == "attention":
            bright = pixels.mean(axis=0) + 1.0
            maps = np.stack([bright, 257.0 - bright])
            return (maps / maps.sum(axis=(1, 2), keepdims=True)).astype(np.float32)
        vector = pixels.reshape(-1) / 255.0 - 0.4987
        return vector if task == "cls" else np.concatenate((vector, vector**2))


def created(settings: Settings, *encoders: FakeEncoder) -> FastAPI:
    """An application that serves these; the first is its default."""
    models = [make_model(one.info, lambda one=one: one, settings) for one in encoders]
    return create_app(settings, models=Models(models))


class _Gate:
    """A place where threads can be held."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()

    def go_through(self) -> None:
        self._reached.set()
        if not self._open.wait(PATIENCE_S):
            raise TimeoutError("nobody opened the gate")

    def open(self) -> None:
        self._open.set()

    def wait_until_reached(self) -> None:
        if not self._reached.wait(PATIENCE_S):
            raise TimeoutError("nobody came to the gate")

    @contextmanager
    def closed(self) -> Iterator["_Gate"]:
        self._reached.clear()
        self._open.clear()
        try:
            yield self
        finally:
            self._open.set()
