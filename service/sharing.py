"""Nothing is computed twice: what is under way is shared, and results are kept for a while."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from service import measurements
from service.deadlines import DeadlineExceeded, WaitedTooLong
from service.errors import ImageError
from service.together import all_or_none

Array = npt.NDArray[np.float32]
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

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


class Work(Protocol[Result_co]):
    """Something under way that several requests may wait for."""

    def results(self) -> Coroutine[Any, Any, Sequence[Result_co]]:
        """What it gives; may be awaited by several, each of which may give up.

        Raises:
            Exception: its failure, or that the request that waits has no more time.
        """

    @property
    def has_failed(self) -> bool:
        """Whether it ended without results; asked before it is abandoned."""

    def abandon(self) -> None:
        """Nobody waits any more: it ends, if it has not ended yet."""


class InTask(Generic[Result]):
    """A coroutine as `Work`, in a task of its own: the deadline is that of who starts it."""

    def __init__(self, work: Coroutine[Any, Any, Sequence[Result]]) -> None:
        self._task: asyncio.Task[Sequence[Result]] | None = asyncio.ensure_future(work)
        self._task.add_done_callback(_seen)

    async def results(self) -> Sequence[Result]:
        """See `Work`."""
        assert self._task is not None  # this request waits: it is not abandoned
        # A waiter that is cancelled cancels its shield, not the work.
        return await asyncio.shield(self._task)

    @property
    def has_failed(self) -> bool:
        """See `Work`."""
        task = self._task
        if task is None or not task.done():
            return False
        return task.cancelled() or task.exception() is not None

    def abandon(self) -> None:
        """See `Work`."""
        if self._task is not None:
            self._task.cancel()
            self._task = None  # its error's traceback holds frames, which hold this


def _seen(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # even where the last waiter has just gone


class Flights(Generic[Key, Result]):
    """Work under way, by key; who asks for one of its results waits for it with the others.

    It goes on for as long as somebody waits for it, whoever started it; it is abandoned when the
    last one goes away. Its failure is everybody's who waits, and is kept for nobody.

    Attributes:
        joined: results taken from work that was under way already, since the start.
    """

    def __init__(self) -> None:
        self.joined = 0
        self._places: dict[Key, tuple[Flight[Result], int]] = {}

    def under_way(self, key: Key) -> "Flight[Result] | None":
        """What `share` would wait for; None where it would start anew."""
        place = self._places.get(key)
        return None if place is None or place[0].work.has_failed else place[0]

    async def share(
        self, keys: Sequence[Key], start: Callable[[Sequence[int]], Work[Result]]
    ) -> list[Result]:
        """The result for each key, in order.

        Args:
            start: begins work for those of `keys`, by position, that are not under way; one call
                for all of them.

        Raises:
            Exception: what `start` raised, or the work.
        """
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        new = sorted(i for key, i in first.items() if self.under_way(key) is None)
        self.joined += len(keys) - len(new)
        if new:
            flight = Flight(start(new), [keys[i] for i in new])
            self._places.update((key, (flight, at)) for at, key in enumerate(flight.keys))
        places = [self._places[key] for key in keys]
        flights = list({id(flight): flight for flight, _ in places}.values())
        for flight in flights:
            flight.waiters += 1
        try:
            if len(flights) == 1:
                found = [await flights[0].work.results()]
            else:
                found = await all_or_none(flight.work.results() for flight in flights)
        finally:
            for flight in flights:
                self._leave(flight)
        results = {id(flight): each for flight, each in zip(flights, found, strict=True)}
        return [results[id(flight)][at] for flight, at in places]

    def _leave(self, flight: "Flight[Result]") -> None:
        flight.waiters -= 1
        flight.has_failed = flight.work.has_failed
        if not flight.waiters:
            flight.work.abandon()
            for key in flight.keys:  # who comes now starts anew
                place = self._places.get(key)
                if place is not None and place[0] is flight:  # none that came after a failure
                    del self._places[key]


@dataclass(eq=False)
class Flight(Generic[Result]):
    """Work under way for several keys at once, and how many wait for it.

    Attributes:
        has_failed: whether it had, when somebody last went away.
    """

    work: Work[Result]
    keys: Sequence[Any]
    waiters: int = 0
    has_failed: bool = False


async def shared(
    flights: Flights[Hashable, Result],
    key: Hashable,
    start: Callable[[], Work[Result]],
    param: str,
) -> Result:
    """What another request is computing under that key, or `start()`'s result where none is.

    What fails for that request alone (its deadline came, or the error names the place of a picture
    there, which is another than `param`) is tried anew.

    Args:
        start: begins work that has one result; is called once at most.
        param: the place of the picture in this request.

    Raises:
        Exception: what `start`, or the work, raised.
    """
    while True:
        other = flights.under_way(key)
        try:
            (result,) = await flights.share([key], lambda _: start())
        except ImageError as error:
            if other is None or error.param == param:
                raise
            (result,) = await Flights[Hashable, Result]().share([key], lambda _: start())  # alone
        except (WaitedTooLong, DeadlineExceeded):
            # The deadline is this request's where the work goes on.
            if other is None or not other.has_failed or measurements.current().is_late:
                raise
            continue
        return result
