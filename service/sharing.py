"""Nothing is computed twice: what is under way is shared, and results are kept for a while."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from service import measurements
from service.deadlines import DeadlineExceeded, WaitedTooLong
from service.errors import ImageError

Array = npt.NDArray[np.float32]
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

_ENTRY_BYTES = 512  # of a key, an array's header and the dictionary's place, about


class ResultCache:
    """Results of the model by what they were computed from; the least recently used goes first.

    For one thread, the event loop's. Several models may share one: the key names the model.

    Args:
        max_bytes: most memory that it takes; 0 keeps nothing.

    Attributes:
        hits, misses, evictions: counted since the start.
        held_bytes: what it takes now.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.evictions = 0
        self.held_bytes = 0
        self._entries: OrderedDict[Hashable, Array] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Array | None:
        """What was kept under `key`, not to be written to; counts a hit or a miss."""
        found = self.peek(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def peek(self, key: Hashable) -> Array | None:
        """As `get`, uncounted: for who has asked before."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: Hashable, result: Array) -> None:
        """Keeps a copy, where it fits at all."""
        if key in self._entries or result.nbytes + _ENTRY_BYTES > self.max_bytes:
            return
        kept = result.copy()  # one row would keep its whole batch alive
        kept.flags.writeable = False
        self._entries[key] = kept
        self.held_bytes += kept.nbytes + _ENTRY_BYTES
        while self.held_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.held_bytes -= oldest.nbytes + _ENTRY_BYTES
            self.evictions += 1


class Flights(Generic[Key, Result]):
    """Computations under way, by key; who asks for one of them waits for it with the others.

    A computation goes on for as long as somebody waits for it, whoever started it; it is cancelled
    when the last one goes away. Its failure is everybody's who waits, and is kept for nobody.

    Attributes:
        joined: results taken from a computation that was under way already, since the start.
    """

    def __init__(self) -> None:
        self.joined = 0
        self._places: dict[Key, tuple[_Flight[Result], int]] = {}

    async def share(
        self,
        keys: Sequence[Key],
        compute: Callable[[Sequence[int]], Coroutine[Any, Any, Sequence[Result]]],
    ) -> list[Result]:
        """The result for each key, in order.

        Args:
            compute: the results for those of `keys`, by position, that are not under way; one call
                for all of them.

        Raises:
            Exception: what a computation raised.
        """
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        new = sorted(i for key, i in first.items() if key not in self._places)
        self.joined += len(keys) - len(new)
        if new:
            self._start([keys[i] for i in new], compute(new))
        places = [self._places[key] for key in keys]
        flights = list({id(flight): flight for flight, _ in places}.values())
        for flight in flights:
            flight.waiters += 1
        try:
            # A waiter that is cancelled cancels its shield, not the work.
            shields = [asyncio.shield(flight.task) for flight in flights]
            await (shields[0] if len(shields) == 1 else asyncio.gather(*shields))
        finally:
            for flight in flights:
                flight.waiters -= 1
                if not flight.waiters and not flight.task.done():
                    flight.task.cancel()
                    self._forget(flight)  # who comes now starts anew
        return [flight.task.result()[at] for flight, at in places]

    def _start(self, keys: Sequence[Key], work: Coroutine[Any, Any, Sequence[Result]]) -> None:
        flight = _Flight[Result](task=asyncio.ensure_future(work), keys=keys)
        for at, key in enumerate(keys):
            self._places[key] = (flight, at)

        def end(task: "asyncio.Future[Sequence[Result]]") -> None:
            if not task.cancelled():
                task.exception()  # seen, even where the last waiter has just gone
            self._forget(flight)

        flight.task.add_done_callback(end)

    def _forget(self, flight: "_Flight[Result]") -> None:
        for key in flight.keys:
            if key in self._places and self._places[key][0] is flight:
                del self._places[key]


@dataclass(eq=False)
class _Flight(Generic[Result]):
    """Work under way for several keys at once, and how many wait for it."""

    task: "asyncio.Future[Sequence[Result]]"
    keys: Sequence[Any]
    waiters: int = 0


async def shared(
    flights: Flights[Hashable, Result],
    key: Hashable,
    compute: Callable[[], Awaitable[Result]],
    param: str,
) -> Result:
    """What another request is computing under that key, or `compute()` where none is.

    What fails for that request alone (its deadline came, or the error names the place of a picture
    there, which is another than `param`) is tried anew.

    Args:
        compute: is called once at most.
        param: the place of the picture in this request.

    Raises:
        Exception: what `compute`, or the other request's, raised.
    """
    while True:
        is_own = False

        async def work(_: Sequence[int]) -> list[Result]:
            nonlocal is_own
            is_own = True
            return [await compute()]

        try:
            (result,) = await flights.share([key], work)
        except ImageError as error:
            if is_own or error.param == param:
                raise
            return await compute()
        except (WaitedTooLong, DeadlineExceeded):
            if is_own or measurements.current().is_late:
                raise
        else:
            return result
