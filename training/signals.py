"""Stopping on a signal: finish the step, write a snapshot, leave with a status that says why.

| signal | sent by | status |
|---|---|---|
| SIGTERM | `kill`, SLURM's `scancel` and preemption, torchrun, container engines | 143 |
| SIGUSR1, SIGUSR2 | SLURM ahead of the time limit: `#SBATCH --signal=USR2@120` | 138, 140 |
| SIGINT | Ctrl-C | 130 |

The status is the shell's own, 128 + the signal's number, so that a batch script can tell a run
that wants to be queued again from one that failed.

SIGUSR2 is the better one for SLURM: some releases of NCCL take SIGUSR1 for themselves
(NVIDIA/nccl, issue 704).

torchrun hands SIGTERM and SIGINT on to its processes and kills them after `--shutdown-timeout`,
30 seconds unless told otherwise; it then leaves with status 1 itself. It hands SIGUSR1 and SIGUSR2
on only where `--signals-to-handle` names them, and dies of them elsewhere.
"""

import os
import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_ASK_EVERY_S = 2.0
_ASK_EVERY_STEPS = 50
_SAME_REQUEST_S = 1.0
_WORKER_GRACE_S = 60


class StopRequest:
    """Notes the signals that ask a run to stop, and lets all processes agree on the step.

        with StopRequest() as stop:
            for step in range(start, end):
                ...
                if stop.wanted():
                    save(...)
                    return stop.status

    A handler does nothing but take a note. A second SIGTERM or SIGINT, more than a second after
    the first (a terminal and a launcher may both send one), ends the process at once.

    Enter it in the main thread, after the process group was made and before the loader's first
    batch. `signals` are those that are noted; the handlers from before come back at the end.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOPPING) -> None:
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self._noted = 0
        self._urged_at_s: float | None = None
        self._agreed = 0
        self._ask_every = 1
        self._since_asked = 0
        self._asked_at_s = time.monotonic()

    def wanted(self) -> bool:
        """Whether every process shall stop after this step; call it once a step on all of them.

        One process just looks at its note. Several compare theirs on the CPU, over gloo: the
        device is not waited for. They do so about every two seconds, at the same steps, because
        each comparison also agrees on the longest time of a step, and thereby on the next one.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self._agreed = self._noted
            return self._agreed != 0
        self._since_asked += 1
        if not self._agreed and self._since_asked == self._ask_every:
            self._compare()
        return self._agreed != 0

    @property
    def status(self) -> int:
        """The exit status that tells why: 128 + the signal; 0 while nothing was agreed on."""
        return 128 + self._agreed if self._agreed else 0

    @property
    def name(self) -> str:
        """The signal that was agreed on, such as "SIGTERM"; "" while none was."""
        return signal.Signals(self._agreed).name if self._agreed else ""

    def __enter__(self) -> Self:
        for each in self._signals:
            self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            # None is a handler that was not set from Python, and cannot be set from there.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        now = time.monotonic()
        if self._urged_at_s is not None and now - self._urged_at_s > _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._urged_at_s = self._urged_at_s or now

    def _compare(self) -> None:
        step_s = (time.monotonic() - self._asked_at_s) / self._since_asked
        mine = torch.tensor([self._noted, round(step_s * 1e6)])
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        self._agreed, longest_us = mine.tolist()
        wished = int(_ASK_EVERY_S * 1e6 / max(longest_us, 1))
        self._ask_every = min(max(wished, 1), _ASK_EVERY_STEPS)
        self._since_asked, self._asked_at_s = 0, time.monotonic()


def shield_worker() -> None:
    """For a loader's worker: leaves signals to the process that trains.

    Ctrl-C, SLURM and some launchers signal every process of a job, workers too, and a worker that
    dies takes the run down in the middle of its step. A worker is told to end by its queue, or
    notices that its parent is gone; it obeys a SIGTERM, which is also what a loader sends to a
    worker that hangs, only after a minute, when the snapshot has long been written.
    """
    for each in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: _end_later())


def _end_later() -> None:
    signal.alarm(_WORKER_GRACE_S)  # SIGALRM ends a process that does not handle it
