"""A model that records its batches, and batchers of it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from service.batcher import Batcher
from tests.service.fakes import PATIENCE_S


class Model:
    """Records its batches, and waits at `gate` in each."""

    def __init__(self) -> None:
        self.batches: list[tuple[Hashable, list[int]]] = []
        self.at_once: list[int] = []
        self.threads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def run(self, kind: Hashable, items: Sequence[int], at_once: int) -> list[tuple[Hashable, int]]:
        self.batches.append((kind, list(items)))
        self.at_once.append(at_once)
        self.threads.append(threading.current_thread().name)
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        if -1 in items:
            raise RuntimeError("no")
        return [(kind, item) for item in items if item != -2]

    async def wait_until_busy(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE_S)


@contextmanager
def batchers_of(model: Model) -> Iterator[Callable[..., Batcher[int, Any]]]:
    """What makes them; they are closed at the end, and their threads must have ended then."""
    made: list[Batcher[int, Any]] = []

    def batcher(
        max_batch: int = 8, max_waiting: int = 100, threads: int = 1, enough: int = 1
    ) -> Batcher[int, Any]:
        limits = {"max_batch": max_batch, "max_waiting": max_waiting}
        made.append(Batcher(model.run, **limits, threads=threads, enough=lambda _: enough))
        return made[-1]

    yield batcher
    model.gate.set()
    for one in made:
        one.close()
        assert not one.alive


async def start(*work: Awaitable[Any]) -> list["asyncio.Task[Any]"]:
    """Runs each up to its first wait: `submit` has its places then."""
    tasks = [asyncio.ensure_future(one) for one in work]
    await asyncio.sleep(0)
    return tasks


async def until_idle(batcher: Batcher[int, Any]) -> None:
    """Until all of its threads wait for work, as they do a moment after the last result came.

    At the start, too: they begin to wait one after another.
    """
    async with asyncio.timeout(PATIENCE_S):
        while not batcher.is_idle or (batcher.alive and len(batcher._idle) < len(batcher._threads)):
            await asyncio.sleep(0)
