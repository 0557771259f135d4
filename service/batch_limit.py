"""How large a batch may be after memory ran out."""

import time


class BatchLimit:
    """Half as many for each time that memory runs out; later, step by step, as many as before.

    Args:
        most: items in one batch, where memory suffices.
        caution_s: seconds without a step up.

    Attributes:
        now: items in one batch, at most.
    """

    def __init__(self, most: int, *, caution_s: float) -> None:
        self.now = most
        self._most = most
        self._caution_s = caution_s
        self._until = 0.0

    @property
    def is_lowered(self) -> bool:
        """Whether memory ran out lately."""
        return self.now < self._most

    def out_of_memory(self, size: int) -> None:
        """A batch of `size` items was too large: half of it is the most from now on."""
        self.now = max(1, min(self.now, size // 2))
        self._until = time.monotonic() + self._caution_s

    def grow_again(self) -> None:
        """Doubles where it is time to."""
        if self.now < self._most and (now := time.monotonic()) >= self._until:
            self.now = min(2 * self.now, self._most)
            self._until = now + self._caution_s
