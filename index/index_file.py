"""A search structure into a file. `faiss` is handed over: `index.ann` alone imports it."""

from io import FileIO
from typing import Any

# Large, because each piece waits for the interpreter's lock.
_PIECE_BYTES = 8 << 20


def write_index(faiss: Any, index: Any, file: FileIO) -> None:
    """Write a structure by Python's own writes.

    C's buffer would lose its last part on a full disk without an error.
    """
    failed: list[OSError] = []

    def write(piece: bytes) -> None:
        left = memoryview(piece)
        try:
            while left and not failed:
                left = left[file.write(left) :]
        except OSError as error:  # kept for later: faiss's buffer writes where nothing may raise
            failed.append(error)

    inner = faiss.PyCallbackIOWriter(write, _PIECE_BYTES)
    outer = faiss.BufferedIOWriter(inner, _PIECE_BYTES)
    try:
        faiss.write_index(index, outer)
    finally:
        # Writes what is left in the buffer; now, and not when the last reference has gone.
        outer.thisown = False
        type(outer).__swig_destroy__(outer)
    if failed:
        raise failed[0]
