"""How many of torch's threads share one product of matrices on the CPU."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

_TRIALS = 5  # of each number of threads
_TRIAL_S = 2.0  # after which no further one is made
_TOO_SLOW = 1.5  # times as slow as one thread was: a little slower they are for a moment, often
_WEIGHT_OF_NEW = 0.1  # of the last product in the running mean of seconds


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Products inside the block are shared by that many; a number of the calling thread's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # which new threads begin with, too


def measured(most: int, once: Callable[[int], object]) -> dict[int, float]:
    """How many seconds `once` takes with 1, 2, 4, ... and `most` threads, about."""
    numbers = [1 << i for i in range(most.bit_length())]
    seconds: dict[int, list[float]] = {n: [] for n in (*numbers, most)}
    end = time.monotonic() + _TRIAL_S
    for _ in range(_TRIALS):
        for number, took in seconds.items():
            started = time.perf_counter()
            once(number)
            took.append(time.perf_counter() - started)
        if time.monotonic() > end:
            break
    return {number: median(took) for number, took in seconds.items()}


class Fastest:
    """With how many threads a product takes the least time, as it was measured and as it goes.

    Threads that wait for their next share of a small product sleep after a while, and to wake them
    may cost more than they save. Where other processes want the same cores, several that wait for
    each other may take many times as long as one.

    Args:
        seconds: by number of threads; see `measured`.
        retry_s: for how long one thread is used after several turned out much slower than it was.
    """

    def __init__(self, seconds: dict[int, float], *, retry_s: float = 5.0) -> None:
        self._seconds = seconds
        self._best = min(seconds, key=lambda number: seconds[number])
        self._retry_s = retry_s
        self._mean_s = seconds[self._best]
        self._alone_until = 0.0

    @property
    def now(self) -> int:
        """The number of threads."""
        return 1 if time.monotonic() < self._alone_until else self._best

    def took(self, number: int, seconds: float) -> None:
        """Learns from one more product."""
        if number != self._best or number == 1:
            return
        alone_s = self._seconds.get(1, math.inf)
        # One that took very long, after a pause perhaps, is no habit.
        self._mean_s += _WEIGHT_OF_NEW * (min(seconds, 2.0 * alone_s) - self._mean_s)
        if self._mean_s > _TOO_SLOW * alone_s:
            self._alone_until = time.monotonic() + self._retry_s
            self._mean_s = self._seconds[self._best]
