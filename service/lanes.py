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
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lane")

    def run(
        self, compute: Callable[[Tensor], Tensor], batch: Tensor, *, most: int | None = None
    ) -> Tensor:
        """`compute(batch)`, for a function that takes each picture [B, ...] on its own.

        Args:
            most: threads of one product, where more would be slower.

        Raises:
            Exception: what `compute` raised for a part, after all parts have ended.
        """
        parts = batch.tensor_split(min(self.threads, len(batch)))
        threads = min(most or self.threads, self.threads // len(parts))
        if len(parts) == 1:
            return _on_threads(threads, compute, batch)
        under_way = [self._pool.submit(_on_threads, threads, compute, part) for part in parts]
        wait(under_way)
        return torch.cat([one.result() for one in under_way])

    def fastest(self, once: Callable[[int], object]) -> int:
        """The number of threads, 1 to all by doubling, with which `once` takes the least time.

        Threads that wait for their next share of a small product sleep, and to wake them may cost
        more than they save.
        """
        numbers = [1 << i for i in range(self.threads.bit_length())]
        seconds: dict[int, list[float]] = {n: [] for n in (*numbers, self.threads)}
        if len(seconds) == 1:
            return self.threads
        end = time.monotonic() + _TRIAL_S
        for _ in range(_TRIALS):
            for number, took in seconds.items():
                started = time.perf_counter()
                once(number)
                took.append(time.perf_counter() - started)
            if time.monotonic() > end:
                break
        return min(seconds, key=lambda number: median(seconds[number]))


def _on_threads(threads: int, compute: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    """`compute(part)` with that many of torch's threads, a number of the calling thread's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return compute(part)
    finally:
        torch.set_num_threads(before)  # which new threads begin with, too
