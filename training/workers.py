"""How a loader's worker processes are started, and ended."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from training.signals import shield_worker


def worker_settings(workers: int) -> dict[str, Any]:
    """A `DataLoader`'s arguments for `workers` processes.

    They are forked, whatever Python's default is: they read unpacked tar files, which have no name
    in the file system, through inherited descriptors, and share the list of pictures in memory.
    """
    return {
        "num_workers": workers,
        "multiprocessing_context": "fork" if workers else None,
        "worker_init_fn": start_worker,
    }


@contextmanager
def ending_workers() -> Iterator[None]:
    """Ends the workers of loaders that an error, or Ctrl-C, has interrupted inside.

    Its traceback holds what the functions were at, and so the loader and its workers. They are
    shielded from signals (`training.signals`): the interpreter's end would wait a minute for them.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def start_worker(_: int) -> None:
    """In a worker: leaves the cores to other workers, and signals to the process that trains."""
    torch.set_num_threads(1)
    shield_worker()
