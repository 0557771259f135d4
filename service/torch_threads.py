"""How many of torch's threads share one product of matrices on the CPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

_TRIALS = 5  # of each number of threads
_TRIAL_S = 2.0  # after which no further one is made


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Products inside the block are shared by that many; a number of the calling thread's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # which new threads begin with, too


def fastest(most: int, once: Callable[[int], object]) -> int:
    """The number of threads, of 1, 2, 4, ... and `most`, with which `once` takes the least time.

    Threads that wait for their next share of a small product sleep, and to wake them may cost
    more than they save.
    """
    numbers = [1 << i for i in range(most.bit_length())]
    seconds: dict[int, list[float]] = {n: [] for n in (*numbers, most)}
    if len(seconds) == 1:
        return most
    end = time.monotonic() + _TRIAL_S
    for _ in range(_TRIALS):
        for number, took in seconds.items():
            started = time.perf_counter()
            once(number)
            took.append(time.perf_counter() - started)
        if time.monotonic() > end:
            break
    return min(seconds, key=lambda number: median(seconds[number]))
