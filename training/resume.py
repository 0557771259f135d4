"""Snapshots of several processes: all go on from the same one, and one of them writes."""

import sys
from pathlib import Path
from typing import Any

from training import snapshot
from training.distributed import World, all_gather_int


def find(run_dir: Path, here: World) -> tuple[int, dict[str, Any]] | None:
    """The newest whole snapshot, (steps done, state), the same on every process; or None.

    What is damaged is named on stderr, with what is taken instead.

    Raises:
        SnapshotError: all are damaged, or the processes do not see the same file; on every process.
    """
    step, state, error = -1, None, None
    if here.is_main:
        try:
            if found := snapshot.newest_good(run_dir, here.device):
                step, state = found.step, found.state
                for warning in found.warnings:
                    print(f"warning: {warning}", file=sys.stderr)
        except snapshot.SnapshotError as problem:
            step, error = -2, problem
    step = all_gather_int(step, here.device)[0]
    if step == -2:
        raise error or snapshot.SnapshotError(f"every snapshot in {run_dir} is damaged")
    if step == -1:
        return None
    if not here.is_main:
        try:
            state = snapshot.load(snapshot.path_of(run_dir, step), here.device)
        except (OSError, snapshot.SnapshotError):
            state = None
    if not all(all_gather_int(int(state is not None), here.device)):
        raise snapshot.SnapshotError(
            f"not every process can read the snapshot of step {step} in {run_dir}; "
            "run_dir must be the same on every node"
        )
    assert state is not None
    return step, state


def save(
    run_dir: Path, step: int, state: dict[str, Any], here: World, *, keep: int, must: bool
) -> None:
    """Writes the snapshot after `step` steps on the main process; the others wait for it.

    Args:
        keep: how many of the newest stay.
        must: raises where it cannot be written. Else a full disk is told on stderr, and the run
            goes on to its next snapshot.

    Raises:
        NotWritten: see `must`; on every process, so that none leaves as if all were well.
    """
    error: snapshot.NotWritten | None = None
    if here.is_main:
        try:
            snapshot.save(run_dir, step, state, keep=keep)
        except snapshot.NotWritten as problem:
            error = problem
    failed = any(all_gather_int(int(error is not None), here.device))
    if failed and must:
        raise error or snapshot.NotWritten("the first process could not write the last snapshot")
    if error is not None:
        print(f"warning: {error}; training goes on", file=sys.stderr)
