"""Large pages for memory that is read here and there.

A processor knows by heart where a few thousand pages lie. Of 4 KiB each that is a few megabytes; a
graph of a million vectors has gigabytes, so each look at a vector had to find its page first: a
fifth of a search's time. Linux gives pages of 2 MiB where it is asked (madvise(2)), but for what
was put there before only when it finds the time.
"""

import ctypes
import sys
from collections.abc import Callable

_LARGE = 2 * 2**20  # of x86-64, and of ARM with base pages of 4 KiB
_PIECE = 32 * _LARGE  # moved in about a tenth of a second
_ADVISE_LARGE, _MOVE_NOW = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, of Linux 6.1 and later


def use_large_pages(
    address: int, size: int, *, should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Have `size` bytes at `address` moved to large pages, as far as those lie inside.

    They may be read and written meanwhile, and must stay there until this returns. Where the system
    cannot, or will not, nothing happens and all is as good as it was. False: it was stopped.
    """
    if sys.platform != "linux":
        return True
    madvise = ctypes.CDLL(None).madvise  # lets go of the interpreter lock
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    start, end = -(-address // _LARGE) * _LARGE, (address + size) // _LARGE * _LARGE
    if start >= end or madvise(start, end - start, _ADVISE_LARGE):
        return True
    for piece in range(start, end, _PIECE):
        if should_stop():
            return False
        madvise(piece, min(_PIECE, end - piece), _MOVE_NOW)
    return True
