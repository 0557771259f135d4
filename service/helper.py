"""A second thread for one piece of work, on another core."""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

_IS_LINUX = hasattr(os, "sched_setaffinity")
_this_core: Callable[[], int] = ctypes.PyDLL(None).sched_getcpu if _IS_LINUX else lambda: -1


class Helper:
    """Does a part of what another thread is doing; one thread at a time has it.

    Meanwhile each of the two keeps to a core of its own. By itself Linux wakes a thread where it
    ran last or where it is woken from, and some kernels look for no idle core then: the two would
    take turns on one.
    """

    def __init__(self) -> None:
        self._is_free, self._is_closed = threading.Lock(), False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="helper")
        self._thread = self._executor.submit(threading.get_native_id).result()

    def both(self, one: Callable[[], T], other: Callable[[], T]) -> tuple[T, T]:
        """The results of both: `other` is done by the calling thread, `one` by the helper.

        Where the helper has other work, or has not begun when `other` is done, the calling thread
        does both.

        Raises:
            Exception: what one of them raised; neither is under way any more.
        """
        if not self._is_free.acquire(blocking=False):
            return one(), other()
        try:
            if self._is_closed:  # what is under way is finished without it
                return one(), other()
            with self._apart():
                running = self._executor.submit(one)
                try:
                    found = other()
                finally:
                    has_begun = not running.cancel()
                    if has_begun:
                        wait([running])
                return (running.result() if has_begun else one()), found
        finally:
            self._is_free.release()

    def close(self) -> None:
        """Ends the thread when it has finished."""
        with self._is_free:
            self._is_closed = True
        self._executor.shutdown()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        if not _IS_LINUX:
            yield
            return
        cores, this = os.sched_getaffinity(0), {_this_core()}
        if cores > this:
            # A sandbox may forbid it, or the cores have changed: the system chooses then.
            with suppress(OSError):
                os.sched_setaffinity(self._thread, cores - this)
                os.sched_setaffinity(0, this)
        try:
            yield
        finally:
            with suppress(OSError):
                os.sched_setaffinity(0, cores)
