"""What becomes of a batch: results for its items, or errors for those that fail even alone."""

import logging
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from service.jobs import BatchFailed, BatchObserver, Job, fail
from service.trouble import Trouble

_WEIGHT_OF_NEW = 0.2  # of the last batch in the running mean of seconds per item
_log = logging.getLogger("service")

Item = TypeVar("Item")
Result = TypeVar("Result")


class BatchRuns(Generic[Item, Result]):
    """Runs batches, in any of the model's threads; one that fails is halved.

    Args:
        run: see `Batcher`.
        is_out_of_memory: whether an error of `run` says so.
        out_of_memory: is told of a batch's size then, and gives the most that are tried from now.
        under_way: how many batches are being run.

    Attributes:
        seconds_per_item: a running mean, of all threads together.
    """

    def __init__(
        self,
        run: Callable[[Hashable, Sequence[Item], int], Sequence[Result]],
        *,
        is_out_of_memory: Callable[[Exception], bool],
        out_of_memory: Callable[[int], int],
        under_way: Callable[[], int],
        observer: BatchObserver | None,
    ) -> None:
        self._run = run
        self._is_out_of_memory = is_out_of_memory
        self._out_of_memory = out_of_memory
        self._under_way = under_way
        self._observer = observer
        self._trouble = Trouble()
        self.seconds_per_item = 0.0

    @property
    def trouble(self) -> str | None:
        """See `Batcher.trouble`."""
        return self._trouble.told

    def serve(self, batch: Sequence[Job[Item, Result]], at_once: int) -> None:
        """Runs a batch; halves of what failed are tried in turn, while that may help."""
        if self._observer is not None:
            for job in batch:
                self._observer.waited((job.started or job.queued) - job.queued)
        failures, succeeded, last = 0, False, ""
        # One bad item costs log2(n) + 1 failures. More than two such: it is not the items.
        most = 0 if self.trouble else 2 * (len(batch).bit_length() + 1)
        failed: list[tuple[Job[Item, Result], Exception]] = []
        parts = [list(batch)]
        while parts:
            part = [job for job in parts.pop() if job.is_wanted]
            if not part:
                continue
            error = self._attempt(part, at_once)
            if error is None:
                succeeded = True
                continue
            failures, last = failures + 1, self._note_failure(error, len(part))
            if len(part) > 1 and failures <= most:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
                continue
            failed += [(job, error) for job in part]
        if failures and not succeeded:
            self._trouble.failed(last, began=batch[0].started or 0.0)
        for job, error in failed:
            failure = BatchFailed("the model failed on this batch of pictures; try again")
            failure.__cause__ = error
            fail(job, failure)

    def _attempt(self, part: Sequence[Job[Item, Result]], at_once: int) -> Exception | None:
        """One call of the model; its error where it failed."""
        started = time.monotonic()
        try:
            results = self._run(part[0].kind, [job.item for job in part], at_once)
            if len(results) != len(part):
                raise ValueError(f"the model gave {len(results)} results for {len(part)}")
        except Exception as error:
            # Whatever the model raised belongs to these items' requests, not to the thread.
            _log.error("a batch of %d failed", len(part), exc_info=error)
            # Its frames hold the batch's memory, and requests would hold the error.
            traceback.clear_frames(error.__traceback__)
            return error
        self._trouble.worked()
        ended = time.monotonic()
        seconds = ended - started
        if self._observer is not None:
            self._observer.batch_done(part[0].kind, len(part), seconds)
        new = seconds / len(part) / max(1, self._under_way())
        old = self.seconds_per_item or new
        self.seconds_per_item = old + _WEIGHT_OF_NEW * (new - old)
        for job, result in zip(part, results, strict=True):
            job.ended = ended
            job.future.set_result(result)
        return None

    def _note_failure(self, error: Exception, size: int) -> str:
        out_of_memory = self._is_out_of_memory(error)
        if self._observer is not None:
            self._observer.batch_failed(out_of_memory=out_of_memory)
        if out_of_memory:
            _log.warning("memory ran out: batches of at most %d for now", self._out_of_memory(size))
        return "out of memory" if out_of_memory else type(error).__name__
