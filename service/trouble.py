"""Whether a model fails by accident, or fails on."""

import threading
import time

PERSISTING = 3  # failed batches in a row that are no accident any more


class Trouble:
    """Counts the batches that failed in a row; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._noted_at = 0.0
        self._last = ""

    @property
    def told(self) -> str | None:
        """What is to be told; None where the model works."""
        if self._in_a_row < PERSISTING:
            return None
        return f"the model failed on the last {self._in_a_row} batches: {self._last}"

    def failed(self, error: str, *, began: float) -> None:
        """A batch came to nothing. Those that were under way together count as one.

        Args:
            error: its name, to be told.
            began: when the batch did, by `time.monotonic()`.
        """
        with self._lock:
            self._last = error
            if began >= self._noted_at:
                self._in_a_row += 1
                self._noted_at = time.monotonic()

    def worked(self) -> None:
        """A batch, or a part of one, was computed."""
        with self._lock:
            self._in_a_row = 0
