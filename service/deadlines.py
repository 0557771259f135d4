"""A request's time limit while its pictures wait and the model works."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

LONGEST_RETRY_S = 60  # `Retry-After` is never more, however long the queue


class WaitedTooLong(Exception):
    """The deadline came while the pictures still waited; try again in `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the pictures waited for longer than the deadline allows; try again")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The deadline came while the pictures were being worked on."""

    def __init__(self) -> None:
        super().__init__("the pictures took longer than the deadline allows")


@asynccontextmanager
async def before(
    deadline: float | None, *, has_begun: Callable[[], bool], retry_after_s: Callable[[], int]
) -> AsyncIterator[None]:
    """Cancels the block at `deadline` (`time.monotonic()`; None: never).

    Raises:
        WaitedTooLong, DeadlineExceeded: it did, by what `has_begun` said then.
    """
    remaining = None if deadline is None else deadline - time.monotonic()
    limit = asyncio.timeout(remaining)
    begun = False
    try:
        async with limit:
            try:
                yield
            except asyncio.CancelledError:
                begun = has_begun()
                raise
    except TimeoutError as error:
        if not limit.expired():
            raise
        if begun:
            raise DeadlineExceeded from error
        raise WaitedTooLong(retry_after_s()) from error


def retry_after(seconds: float) -> int:
    """A wait as the header `Retry-After` has it: whole seconds, one at least."""
    return max(1, min(LONGEST_RETRY_S, math.ceil(seconds)))
