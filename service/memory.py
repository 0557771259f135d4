"""Memory that was freed goes back to the system.

glibc keeps what large pictures leave behind, in an arena for each thread: after some thousands of
pictures of all sizes a process held five times what it used (docs/security.md).
"""

import asyncio
import ctypes
from collections.abc import Callable


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
