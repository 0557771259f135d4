"""A service's life: starting behind an open port, ready, watched, stopping."""

import asyncio
import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from index.errors import CollectionError
from service.door import route_path
from service.errors import busy_response
from service.services import Services
from service.vision import Vision

CANNOT_START = 2  # exit status: the settings name what is not there, or cannot be used
FAILED = 1  # exit status: a thread died, or an error that nobody foresaw
_ALLOCATIONS = 5000  # of containers between two looks at the youngest; a request makes hundreds
OPEN_AT_ONCE = frozenset({"/healthz", "/readyz", "/metrics"})
_log = logging.getLogger("service")

Tell = Callable[[str], None]
End = Callable[[int], None]
T = TypeVar("T")


class Lifecycle:
    """Starts, watches and stops what `start` puts together.

    Args:
        start: loads everything, in a thread; says by its argument what it is at.
        stop: its counterpart.
        end: ends the process with an exit status, for its supervisor. Without it nobody could be
            told of a start that fails, so `begin` waits for the start and raises its error.
        watch_s: how often threads are looked at.
        probe_s: how often a model in trouble that nobody asks is tried with a picture.
        stop_s: longest wait for the threads to finish.
    """

    def __init__(
        self,
        start: Callable[[Tell], Services],
        stop: Callable[[Services], None],
        *,
        end: End | None = None,
        watch_s: float = 0.5,
        probe_s: float = 5.0,
        stop_s: float = 5.0,
    ) -> None:
        self._start = start
        self._stop = stop
        self._end = end
        self._watch_s = watch_s
        self._probe_s = probe_s
        self._stop_s = stop_s
        self._doing: str | None = "starting"
        self._dead: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._under_way: set[asyncio.Task[object]] = set()
        self._probed_at: dict[str, float] = {}
        self.services: Services | None = None
        self.left_threads = False

    @property
    def is_open(self) -> bool:
        """Whether requests are let in."""
        return self._doing is None

    def why_not_ready(self) -> list[str]:
        """What keeps the service from being of use; empty when it is ready."""
        if self._doing is not None:
            return [self._doing]
        if self._dead is not None:
            return [f"{self._dead}; the process ends"]
        if self.services is None:
            return []
        longest_s = self.services.settings.deadline_seconds
        reasons = (_trouble_of(vision, longest_s) for vision in self.services.visions)
        return [reason for reason in reasons if reason is not None]

    async def begin(self) -> None:
        """Starts; returns at once where `end` was given."""
        if self._end is None:
            self._open(await self._started())
        else:
            self._tasks.append(asyncio.create_task(self._begin_behind_the_port(self._end)))

    async def close(self) -> None:
        """Stops; `left_threads` says whether some did not end in time."""
        self._doing = "stopping"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        services, self.services = self.services, None
        if services is None:
            return
        stopping = _in_a_thread(lambda: self._stop(services), name="stop")
        try:
            await asyncio.wait_for(asyncio.wrap_future(stopping), self._stop_s)
        except TimeoutError:
            self.left_threads = True
            _log.error("threads did not end within %g s; they are left behind", self._stop_s)

    def enter(self, task: "asyncio.Task[object]") -> None:
        """A request's task is under way; it is cancelled when a thread that it may need dies."""
        self._under_way.add(task)

    def leave(self, task: "asyncio.Task[object]") -> None:
        """It is over."""
        self._under_way.discard(task)

    async def _begin_behind_the_port(self, end: End) -> None:
        try:
            services = await self._started()
        except (CollectionError, OSError, ValueError) as error:
            _log.critical("error: %s", error)
            end(CANNOT_START)
        except Exception as error:
            _log.critical("the service cannot start", exc_info=error)
            end(FAILED)
        else:
            # What is loaded stays, and is most of what the collector would look through each time.
            # Collections that are deleted let go of their vectors by themselves (`Mirror.forget`).
            gc.collect()
            gc.freeze()
            gc.set_threshold(_ALLOCATIONS, *gc.get_threshold()[1:])
            self._open(services)

    async def _started(self) -> Services:
        # A daemon: a process that is told to stop does not wait for a model that loads.
        starting = _in_a_thread(lambda: self._start(self._tell), name="start")
        try:
            return await asyncio.wrap_future(starting)
        except asyncio.CancelledError:
            self.left_threads = not starting.done()
            raise

    def _tell(self, doing: str) -> None:
        _log.info("%s", doing)
        self._doing = doing

    def _open(self, services: Services) -> None:
        self.services = services
        self._doing = None
        self._tasks.append(asyncio.create_task(self._watch(services)))

    async def _watch(self, services: Services) -> None:
        """Looks after the threads until one is dead."""
        while self._dead is None:
            await asyncio.sleep(self._watch_s)
            for vision in services.visions:
                self._dead = vision.dead or self._dead
                await self._probe(vision)
        _log.critical("%s: the process ends, for its supervisor to start another", self._dead)
        for task in self._under_way:
            task.cancel()
        if self._end is not None:
            self._end(FAILED)

    async def _probe(self, vision: Vision) -> None:
        """Tries a model that is in trouble, where no request does."""
        if vision.batcher.trouble is None or not vision.batcher.is_idle:
            return
        name, now = vision.info.name, asyncio.get_running_loop().time()
        if now - self._probed_at.get(name, float("-inf")) < self._probe_s:
            return
        self._probed_at[name] = now
        try:
            async with asyncio.timeout(self._probe_s):
                await vision.probe()
        except Exception as error:
            # Whatever it is, the next probe may do better, and threads are to be looked after.
            _log.warning("the model %r is still in trouble: %r", name, error)
        else:
            _log.info("the model %r works again", name)


class Gate:
    """ASGI middleware: until the service is ready, 503 for all but the probes and the metrics."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or lets the request in."""
        if scope["type"] != "http" or route_path(scope) in OPEN_AT_ONCE:
            await self._app(scope, receive, send)
            return
        if not self._lifecycle.is_open:
            (reason, *_) = self._lifecycle.why_not_ready()
            message = f"the service is not ready: {reason}"
            await busy_response(503, message, code="starting")(scope, receive, send)
            return
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an ASGI application is called in a task")
        self._lifecycle.enter(task)
        try:
            await self._app(scope, receive, send)
        finally:
            self._lifecycle.leave(task)


def _trouble_of(vision: Vision, longest_s: float) -> str | None:
    trouble, busy_s = vision.batcher.trouble, vision.batcher.busy_s
    if trouble is None and busy_s > longest_s:
        trouble = f"the model has been working on one batch for {busy_s:.0f} s"
    return None if trouble is None else f"{vision.info.name}: {trouble}"


def _in_a_thread(work: Callable[[], T], *, name: str) -> "Future[T]":
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done
