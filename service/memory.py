"""Memory: freed, it goes back to the system; and whether an error says that there was none.

glibc keeps what large pictures leave behind, in an arena for each thread: after some thousands of
pictures of all sizes a process held five times what it used (docs/security.md).
"""

import asyncio
import ctypes
from collections.abc import Callable

import torch


def trimmer() -> Callable[[], None] | None:
    """What gives freed memory back, in milliseconds; None where the C library is not glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return lambda: trim(0)


async def give_back(trim: Callable[[], None], *, every_s: float) -> None:
    """Trims in a thread, again and again, until it is cancelled."""
    while True:
        await asyncio.sleep(every_s)
        await asyncio.to_thread(trim)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of `run` says that there was no memory, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU's allocator raises a plain RuntimeError.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text
    )
