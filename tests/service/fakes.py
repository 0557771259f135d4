"""An encoder without a network: vectors are pixels, so what looks alike is found."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from fastapi import FastAPI
from PIL import Image

from backbone.preprocess import Extent
from service.app import create_app
from service.encoder import Array, AttentionTask, ModelInfo, Task, TokensTask
from service.lifecycle import End
from service.loading import make_model, share
from service.metrics import Metrics
from service.models import Models
from service.patch_maps import patch_at
from service.settings import Settings

PATIENCE_S = 60.0  # longest wait for an event that is bound to come; ends a test that would hang


class FakeEncoder:
    """See `service.encoder.Encoder`. CLS is a 4 x 4 miniature, attention is brightness.

    Attributes:
        calls: (task, number of pictures) of every call of `run` since the last `calls.clear()`.
        failure: raised by `run` while it is set.
        pause_s: how long each call of `run` takes.
    """

    cell = 4
    batches_at_once = 1

    def __init__(self, name: str = "fake", fingerprint: str = "f" * 16) -> None:
        self.info = ModelInfo(
            name=name,
            fingerprint=fingerprint,
            architecture="fake/4",
            embedding_size=48,
            copy_embedding_size=96,
            input_size=16,
            patch_size=4,
            max_resolution=34,
            heads=2,
            blocks=2,
            features={"cls": 48, "last4": 192, "cls+mean": 51, "patches": 3, "copy": 96},
            picture_mode="RGB",
            licence="CC0-1.0",
        )
        self.calls: list[tuple[Task, int]] = []
        self.failure: Exception | None = None
        self.pause_s = 0.0
        self._model = _Gate()
        self._decoding = _Gate()

    def prepare(self, task: Task, picture: Image.Image, *, extent: Extent | None = None) -> Array:
        self._decoding.go_through()
        width, height = picture.size
        if isinstance(task, TokensTask | AttentionTask):
            shape = (max(1, min(64, width // self.cell)), max(1, min(64, height // self.cell)))
        else:
            shape = (4, 4)
        pixels = np.asarray(picture.resize(shape, Image.Resampling.BOX), dtype=np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def needed(self, task: Task, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def warm_up(self, task: Task, prepared: Array, *, most: int) -> None:
        self.run(task, [prepared])

    def run(self, task: Task, inputs: Sequence[Array], *, at_once: int = 1) -> list[Array]:
        self.calls.append((task, len(inputs)))
        self._model.go_through()
        time.sleep(self.pause_s)
        if self.failure is not None:
            raise self.failure
        return [self._result(task, one) for one in inputs]

    def enough(self, shape: tuple[int, ...]) -> int:
        return 1

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
        if isinstance(task, AttentionTask):
            return _attention(task, pixels)
        if isinstance(task, TokensTask) or task == "patches":
            return np.ascontiguousarray(pixels.transpose(1, 2, 0)) / np.float32(255.0)
        vector = pixels.reshape(-1) / 255.0 - 0.4987
        more: dict[Task, Array] = {
            "cls": vector[:0],
            "last4": np.concatenate([vector * n for n in (2, 3, 4)]),
            "cls+mean": pixels.mean(axis=(1, 2)) / 255.0,
            "copy": vector**2,
        }
        return np.concatenate((vector, more[task]))


def _attention(task: AttentionTask, pixels: Array) -> Array:
    """Brightness and darkness; of a point, less where it is far; less in the first block."""
    bright = pixels.mean(axis=0) + 1.0
    maps = np.stack([bright, 257.0 - bright])
    if task.point is not None:
        row, column = patch_at(task.point, bright.shape)
        rows, columns = np.indices(bright.shape)
        maps = maps / (1.0 + np.abs(rows - row) + np.abs(columns - column))
    maps = maps / maps.sum(axis=(1, 2), keepdims=True)
    if task.block is None:
        maps = maps.mean(axis=0, keepdims=True)
    elif task.block == 0:
        maps = maps / 2
    return maps.astype(np.float32)


def models_of(settings: Settings, metrics: Metrics, *encoders: FakeEncoder) -> Models:
    shared = share(settings, metrics)
    models = [make_model(one.info, lambda one=one: one, settings, shared) for one in encoders]
    return Models(models, pool=shared.pool)


def created(settings: Settings, *encoders: FakeEncoder, end: End | None = None) -> FastAPI:
    """An application that serves these; the first is its default."""

    def find(settings: Settings, metrics: Metrics) -> Models:
        return models_of(settings, metrics, *encoders)

    return create_app(settings, find=find, end=end)


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
