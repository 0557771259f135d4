"""Bounded dynamic batching without a timer: requests gather while the model is busy.

The model's threads own it: one, or on the CPU one for each core, each with a batch of its own. One
that is free takes the oldest waiting item, and with it others of the same kind, up to the largest
batch, of which it leaves their share to other free threads. So a lone request waits for nobody, and
under load batches fill by themselves. A batch that fails is halved until what fails stands alone.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from service import deadlines
from service.batch_limit import BatchLimit
from service.batch_runs import BatchRuns
from service.jobs import BatcherClosed, BatchObserver, Job, QueueFull, fail, note_times

_log = logging.getLogger("service")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs `run(kind, items, at_once)` in threads of its own, on batches of items of one kind.

    Args:
        run: gives one result per item, in order. `at_once` calls are under way or about to begin,
            this one among them.
        threads: calls of `run` that are made at once.
        max_batch: most items in one call; of several threads each has its share, or `enough`.
        enough: of a kind, items that are worth a batch. Where one is computed already and fewer
            wait, while others are expected (`expect`) and no core is free, the next one waits for
            them: to begin it would only slow what is under way.
        max_waiting: most items that wait; more are refused.
        max_waiting_bytes: most bytes of items that wait, by `size_of`; one request may be larger
            where nothing else waits.
        is_out_of_memory: whether an error of `run` says so. It makes batches smaller, by half
            for each such error, and one is computed after another; `caution_s` seconds later they
            may double again, up to as it was.
    """

    def __init__(
        self,
        run: Callable[[Hashable, Sequence[Item], int], Sequence[Result]],
        *,
        max_batch: int,
        max_waiting: int,
        max_waiting_bytes: int | None = None,
        threads: int = 1,
        enough: Callable[[Hashable], int] = lambda _: 1,
        size_of: Callable[[Item], int] = lambda _: 0,
        is_out_of_memory: Callable[[Exception], bool] = lambda _: False,
        caution_s: float = 60.0,
        observer: BatchObserver | None = None,
    ) -> None:
        self._runs = BatchRuns(
            run,
            is_out_of_memory=is_out_of_memory,
            out_of_memory=self._out_of_memory,
            under_way=lambda: len(self._running),
            observer=observer,
        )
        self._enough = enough
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self._size_of = size_of
        self._waiting: deque[Job[Item, Result]] = deque()
        self._waiting_bytes = 0
        self._expected = 0
        self._running: dict[int, float] = {}  # thread -> when its batch began
        self._limit = BatchLimit(max_batch, caution_s=caution_s)
        self._lock = threading.Lock()
        self._turns = [threading.Condition(self._lock) for _ in range(threads)]
        self._idle: set[int] = set()  # threads that wait for their turn
        self._lent: dict[int, Callable[[], None]] = {}  # what a thread is to do next
        self._away: set[int] = set()  # threads that are doing it
        self._numbers: dict[int, int] = {}  # identifier of a thread -> its number here
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"model_{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether all of the model's threads are running."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the items that wait."""
        return self._waiting_bytes

    @property
    def batch_limit(self) -> int:
        """Most items in one call now: less than at the start after memory ran out."""
        return self._limit.now

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._lock:
            is_lent = bool(self._lent or self._away)
            return not self._running and not self._waiting and not is_lent

    @property
    def busy_s(self) -> float:
        """For how long the oldest batch has been running, in seconds; 0 where none is."""
        since = list(self._running.values())
        return time.monotonic() - min(since) if since else 0.0

    @property
    def trouble(self) -> str | None:
        """Why the model is of no use now: several batches failed in a row; None where it works."""
        return self._runs.trouble

    def retry_after_s(self) -> int:
        """When what waits now will be through, by the rate that was measured."""
        return deadlines.retry_after(self.waiting * self._runs.seconds_per_item)

    async def submit(
        self, kind: Hashable, items: Sequence[Item], *, deadline: float | None = None
    ) -> list[Result]:
        """Waits for the results of `items`, in order; batches may mix them with others'.

        Args:
            deadline: by `time.monotonic()`; items that still wait then leave the queue.

        Raises:
            BatchFailed: the model raised an error on one of them.
            QueueFull: there are no places for all of them, or the wait would be too long; none
                is taken.
            WaitedTooLong, DeadlineExceeded: the deadline came before the results.
            BatcherClosed: the batcher was closed, or a thread of it ended.
        """
        return await self.results(self.put(kind, items, deadline=deadline), deadline=deadline)

    def put(
        self, kind: Hashable, items: Sequence[Item], *, deadline: float | None = None
    ) -> list[Job[Item, Result]]:
        """Places for `items`, from any thread; who takes them calls `results` or `withdraw`.

        Raises:
            QueueFull, BatcherClosed: see `submit`.
        """
        now = time.monotonic()
        jobs = [Job[Item, Result](kind, item, self._size_of(item), now) for item in items]
        with self._lock:
            if self._closed:
                raise BatcherClosed("the model takes no more pictures: the service is stopping")
            self._check_room(jobs, None if deadline is None else deadline - now)
            self._waiting.extend(jobs)
            self._waiting_bytes += sum(job.n_bytes for job in jobs)
            self._wake()
        return jobs

    def expect(self) -> Callable[[], None]:
        """Announces an item that will be put soon, or fail.

        Returns:
            What is to be called, from any thread, when it was put, or will not be; once or more.
        """
        is_over = False
        with self._lock:
            self._expected += 1

        def over() -> None:
            nonlocal is_over
            with self._lock:
                if not is_over:
                    is_over = True
                    self._expected -= 1
                    self._wake()

        return over

    def lend(self, work: Callable[[], None]) -> bool:
        """Has `work`, which raises nothing, done by a thread of the model that is free.

        What is put there is the same thread's next batch: a lone picture is decoded and embedded
        in one, and nobody has to be woken in between. A thread of the model that asks does it
        itself, after the batch that it has.

        Returns:
            False where no other thread would be left for what comes meanwhile, or no core is free
            (the work itself is expected already): it is for others to do then.
        """
        own = self._numbers.get(threading.get_ident())
        with self._lock:
            if self._closed or self._waiting or self._free < 0:
                return False
            if len(self._idle) < (2 if own is None else 1) or own in self._lent:
                return False
            thread = min(self._idle) if own is None else own
            self._idle.discard(thread)
            self._lent[thread] = work
            self._turns[thread].notify()
            return True

    async def results(
        self, jobs: Sequence[Job[Item, Result]], *, deadline: float | None = None
    ) -> list[Result]:
        """Waits for the results of `put`, in order; see `submit`, which is both."""
        try:
            async with deadlines.before(
                deadline,
                has_begun=lambda: any(job.started is not None for job in jobs),
                retry_after_s=self.retry_after_s,
            ):
                if len(jobs) == 1:
                    return [await asyncio.wrap_future(jobs[0].future)]
                return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        finally:
            self.withdraw(jobs)
            note_times(jobs)

    def withdraw(self, jobs: Sequence[Job[Item, Result]]) -> None:
        """Frees the places of a request that failed or went away; nothing where all is done."""
        for job in jobs:
            job.is_wanted = False
        cancelled = [job for job in jobs if job.future.cancel()]
        if cancelled:
            with self._lock:
                kept = deque(job for job in self._waiting if not job.future.cancelled())
                self._waiting = kept
                self._waiting_bytes = sum(job.n_bytes for job in kept)

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Refuses new items, finishes those that wait, and ends the threads.

        Returns:
            Whether all ended within `timeout_s` seconds.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._close()
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _check_room(self, jobs: Sequence[Job[Item, Result]], patience_s: float | None) -> None:
        waiting = len(self._waiting)
        if waiting + len(jobs) > self.max_waiting:
            message = f"the queue is full: {self.max_waiting} pictures may wait for the model"
            raise QueueFull(message, reason="queue_full", retry_after_s=self.retry_after_s())
        if not waiting:
            return
        n_bytes = self._waiting_bytes + sum(job.n_bytes for job in jobs)
        if self.max_waiting_bytes is not None and n_bytes > self.max_waiting_bytes:
            message = f"the queue is full: {self.max_waiting_bytes} bytes may wait for the model"
            raise QueueFull(message, reason="queue_bytes", retry_after_s=self.retry_after_s())
        wait_s = waiting * self._runs.seconds_per_item
        if patience_s is not None and wait_s > patience_s:
            message = f"the queue is too long: about {wait_s:.1f} s, {patience_s:.1f} s are left"
            raise QueueFull(message, reason="deadline", retry_after_s=self.retry_after_s())

    def _work(self, thread: int) -> None:
        batch: list[Job[Item, Result]] = []
        self._numbers[threading.get_ident()] = thread
        try:
            while True:
                batch, at_once = self._next_batch(thread)
                if thread in self._lent:
                    self._away.add(thread)  # first: it is never seen as idle
                    work = self._lent.pop(thread)
                    work()
                    self._away.discard(thread)
                    del work  # what it holds is not held until there is more to do
                    continue
                if not batch:
                    return
                self._runs.serve(batch, at_once)
                batch = []  # see above
        except BaseException as error:
            # Not an error of the model's, those are caught: the process has to be told, and ends.
            _log.critical("a thread of the model ended", exc_info=error)
        finally:
            with self._lock:
                self._running.pop(thread, None)
                left = [*batch, *self._waiting]
                self._waiting.clear()
                self._waiting_bytes = 0
                self._close()
            for job in left:
                if job.started is not None or job.future.set_running_or_notify_cancel():
                    fail(job, BatcherClosed("a thread of the model has ended"))
            if thread in self._lent:
                self._lent.pop(thread)()  # somebody waits for it

    def _next_batch(self, thread: int) -> tuple[list[Job[Item, Result]], int]:
        """The next batch, and how many share the cores.

        Empty where the thread is lent, and once all is closed and drained.
        """
        with self._lock:
            self._running.pop(thread, None)
            while thread not in self._lent:
                if self._has_work():
                    self._limit.grow_again()
                    batch = self._take()
                    if batch:
                        now = time.monotonic()
                        for job in batch:
                            job.started = now
                        self._running[thread] = now
                        self._wake()
                        return batch, self._at_once(thread)
                elif self._closed and not self._waiting:
                    return [], 0
                else:
                    self._idle.add(thread)
                    self._turns[thread].wait()
                    self._idle.discard(thread)
            self._wake()  # what came meanwhile is another thread's now
            return [], 0

    def _at_once(self, thread: int) -> int:
        """How many share the cores with this thread's batch, itself among them.

        Torch keeps a team of threads for each that ever had several cores, and those of two teams
        are more than the cores, so that none of them waits for work awake: the first alone has one.
        """
        running = len(self._running)
        if not self._limit.is_lowered:
            running += min(len(self._threads) - running, len(self._waiting) + self._expected)
        return running if thread == 0 else max(2, running)

    def _take(self) -> list[Job[Item, Result]]:
        """Out of the queue: the oldest of one kind, no more than this thread's share of them."""
        kind = self._waiting[0].kind
        found = sum(job.kind == kind and not job.future.cancelled() for job in self._waiting)
        # More than enough is left to the next thread that is free: each is as cheap there.
        threads, enough, limit = len(self._threads), self._enough(kind), self._limit.now
        fair = max(enough, _share(found, threads))
        largest = max(_share(limit, threads), min(enough, limit))
        most = min(_share(found, max(1, self._free)), fair, largest)
        batch, others = list[Job[Item, Result]](), deque[Job[Item, Result]]()
        for job in self._waiting:
            is_full = len(batch) == most and not job.future.cancelled()
            if job.kind != kind or is_full:
                others.append(job)
            elif job.future.set_running_or_notify_cancel():
                batch.append(job)
        self._waiting = others
        self._waiting_bytes = sum(job.n_bytes for job in others)
        return batch

    @property
    def _free(self) -> int:
        """Threads for which there is a core that nothing else is about to take."""
        at_once = 1 if self._limit.is_lowered else len(self._threads)
        return at_once - len(self._running) - self._expected

    def _has_work(self) -> bool:
        """Whether a thread that waits is to take a batch now."""
        if not self._waiting or not self._running:
            return bool(self._waiting)
        if self._limit.is_lowered:
            return False
        enough = min(self._enough(self._waiting[0].kind), self.max_waiting)
        return self._free > 0 or len(self._waiting) >= enough or self._closed

    def _wake(self) -> None:
        """The first of those that wait, which may have all cores; see `_at_once`.

        None where the caller is one that was lent: it looks for work itself next.
        """
        own = self._numbers.get(threading.get_ident())
        if self._idle and self._has_work() and own not in self._away:
            self._turns[min(self._idle)].notify()

    def _close(self) -> None:
        self._closed = True
        for turn in self._turns:
            turn.notify()

    def _out_of_memory(self, size: int) -> int:
        with self._lock:
            self._limit.out_of_memory(size)
            return self._limit.now


def _share(items: int, threads: int) -> int:
    return -(-items // threads)
