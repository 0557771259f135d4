"""The service around a fake encoder that a file directs.

The JSON file that SLOW_SERVICE names is read before each batch: `load_s`, `batch_s` and `decode_s`
are how long loading, a batch and a decoding take; `fail` is what a batch raises: "error", "memory"
(where it has more than `fits` pictures), "exit" (the thread ends), and "kill_decoder" ends a
decoding thread.
"""

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import service.app
from backbone.preprocess import Extent
from service.__main__ import main
from service.encoder import Array, Task
from service.metrics import Metrics
from service.models import Models
from service.settings import Settings
from tests.service.fakes import FakeEncoder, models_of


class DirectedEncoder(FakeEncoder):
    def prepare(self, task: Task, picture: Image.Image, *, extent: Extent | None = None) -> Array:
        time.sleep(how().get("decode_s", 0.0))
        return super().prepare(task, picture, extent=extent)

    def run(self, task: Task, inputs: Sequence[Array], *, at_once: int = 1) -> list[Array]:
        told = how()
        time.sleep(told.get("batch_s", 0.0))
        fail = told.get("fail")
        if fail == "error":
            raise RuntimeError("a secret of the device")
        if fail == "memory" and len(inputs) > told["fits"]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if fail == "exit":
            sys.exit(7)
        if fail == "kill_decoder":
            kill_a_decoder()
        return super().run(task, inputs, at_once=at_once)


def how() -> dict[str, Any]:
    path = Path(os.environ["SLOW_SERVICE"])
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return told


def kill_a_decoder() -> None:
    """Raises SystemExit in a thread that waits for pictures."""
    time.sleep(0.05)  # it may still be ending what it did for this one
    thread = next(one for one in threading.enumerate() if one.name.startswith("decode"))
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    )


def find(settings: Settings, metrics: Metrics) -> Models:
    time.sleep(how().get("load_s", 0.0))
    if how().get("fail") == "load":
        raise ValueError("model 'x' is damaged")
    return models_of(settings, metrics, DirectedEncoder())


def run() -> int:
    """`python -m service` with that encoder."""
    service.app.find_models = find
    return main()
