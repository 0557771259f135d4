"""Training state on disk: written atomically, complete, read without running code."""

import os
import re
from pathlib import Path
from typing import Any

import torch

KEEP = 2
_NAME = re.compile(r"step_(\d{9})\.pt")


class SnapshotError(ValueError):
    """A snapshot that cannot be gone on from; the message says why and what to do."""


def save(run_dir: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` (tensors, numbers, strings, containers) as the snapshot after `step` steps.

    The file appears under its name only when it is whole and on disk: temporary file, fsync,
    rename, fsync of the folder. Older ones but the last `KEEP` are removed after that.
    """
    folder = run_dir / "snapshots"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    temporary = path.with_suffix(".pt.partial")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(folder)
    for _, old in _all(run_dir)[:-KEEP]:
        old.unlink()
    return path


def latest(run_dir: Path) -> tuple[int, Path] | None:
    """The newest snapshot of a run as (steps done, path); None where there is none."""
    found = _all(run_dir)
    return found[-1] if found else None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a snapshot, refusing anything that could run code.

    Raises:
        SnapshotError: a file that is damaged or no snapshot.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        # torch.load documents no exception types, and its message tells how to switch safety off.
        raise SnapshotError(
            f"snapshot {str(path)!r} is damaged; remove it to go on from the one before"
        ) from error
    if not isinstance(state, dict) or "student" not in state or "step" not in state:
        raise SnapshotError(f"{str(path)!r} is not a snapshot of this program")
    return state


def _all(run_dir: Path) -> list[tuple[int, Path]]:
    folder = run_dir / "snapshots"
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
