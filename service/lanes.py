"""A batch over the cores: parts of it side by side, where threads inside a product would wait."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from statistics import median

import torch
from torch import Tensor

_TRIALS = 5  # of each number of threads
_TRIAL_S = 2.0  # after which no further one is made


class Lanes:
    """Computes the parts of a batch side by side, each on its share of the cores.

    A product of matrices that two threads share ends when the slower of them has done its half,
    and a forward pass has hundreds of products: where other threads want the same cores, that is
    hundreds of waits. The parts of a batch wait for each other once.

    Args:
        threads: the cores to use.

    Attributes:
        most: threads of one product; fewer than `threads` where more would be slower.
    """

    def __init__(self, threads: int) -> None:
        self.threads = self.most = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lane")

    def run(self, compute: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """`compute(batch)`, for a function that takes each picture [B, ...] on its own.

        Raises:
            Exception: what `compute` raised for a part, after all parts have ended.
        """
        parts = batch.chunk(min(self.threads, len(batch)))

        def lane(part: Tensor) -> Tensor:
            # torch keeps this number for each thread.
            torch.set_num_threads(min(self.most, self.threads // len(parts)))
            return compute(part)

        if len(parts) == 1:
            return lane(batch)
        under_way = [self._pool.submit(lane, part) for part in parts]
        wait(under_way)
        return torch.cat([one.result() for one in under_way])

    def measure(self, once: Callable[[], object]) -> None:
        """Sets `most` to one thread or all of them, whichever does `once`, a small batch, faster.

        Threads that wait for their next share of a small product sleep, and to wake them may cost
        more than they save.
        """
        if self.threads == 1:
            return
        seconds: dict[int, list[float]] = {1: [], self.threads: []}
        end = time.monotonic() + _TRIAL_S
        for _ in range(_TRIALS):
            for self.most, took in seconds.items():
                started = time.perf_counter()
                once()
                took.append(time.perf_counter() - started)
            if time.monotonic() > end:
                break
        self.most = min(seconds, key=lambda threads: median(seconds[threads]))
