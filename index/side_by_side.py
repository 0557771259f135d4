"""Work shared out to a thread for each core."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import faiss

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, in threads that all callers share; an item's error is raised in its turn."""
    return _threads().map(work, items)


@cache
def _threads() -> ThreadPoolExecutor:
    """As many as OpenMP would use: the cores that this process may run on, if nothing is set."""
    return ThreadPoolExecutor(int(faiss.omp_get_max_threads()), thread_name_prefix="search")
