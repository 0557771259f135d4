"""Training state on disk: written atomically, complete, checked, read without running code."""

import hashlib
import os
import pickle
import re
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

KEEP = 2
_NAME = re.compile(r"step_(\d{9})\.pt")
_PARTIAL = ".partial"
_MARK = b"dinoscope snapshot, sha256:"
_TRAILER_BYTES = len(_MARK) + hashlib.sha256().digest_size
_BLOCK_BYTES = 1 << 22


class SnapshotError(ValueError):
    """A snapshot that cannot be gone on from; the message says why and what to do."""


class Damaged(SnapshotError):
    """A file whose bytes are not those that were written, or that is no snapshot at all."""


class NotWritten(SnapshotError):
    """A snapshot that could not be written: a full disk, say. Those from before still stand, so
    that a run may go on and try again."""


class Found(NamedTuple):
    """The newest snapshot of a run that is whole; see `newest_good`.

    Attributes:
        step: steps done.
        path: its file.
        state: what was saved.
        warnings: a line for each newer file that is damaged, and what is taken instead.
    """

    step: int
    path: Path
    state: dict[str, Any]
    warnings: tuple[str, ...]


def save(run_dir: Path, step: int, state: dict[str, Any], *, keep: int = KEEP) -> Path:
    """Writes `state` (tensors, numbers, strings, containers) as the snapshot after `step` steps.

    The file appears under its name only when it is whole and on disk: temporary file, fsync,
    rename, fsync of the folder. Then the older ones but the last `keep` are removed; and those of
    later steps, which can only be damaged ones that the run has fallen back from. What a killed
    run left half written is removed before. The disk must hold `keep` + 1 snapshots.

    Raises:
        NotWritten: the disk is full or fails; nothing half written stays, nothing old is removed.
        ValueError: `keep` is not at least 1.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least 1 snapshot must be kept")
    path = path_of(run_dir, step)
    temporary = path.with_suffix(path.suffix + _PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"*{_PARTIAL}"):
            stale.unlink()
        _write(temporary, state)
        temporary.replace(path)
        _sync_folder(path.parent)
        done = [(at, each) for at, each in _all(run_dir) if at <= step][-keep:]
        for each in _all(run_dir):
            if each not in done:
                each[1].unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):  # the disk that has just failed may fail again: the first tells why
            temporary.unlink(missing_ok=True)
        raise NotWritten(
            f"snapshot {str(path)!r} could not be written: {error.strerror}; "
            "the snapshots from before still stand"
        ) from error
    return path


def path_of(run_dir: Path, step: int) -> Path:
    """Where the snapshot after `step` steps lies."""
    return run_dir / "snapshots" / f"step_{step:09d}.pt"


def latest(run_dir: Path) -> tuple[int, Path] | None:
    """The newest snapshot of a run as (steps done, path), whole or not; None if there is none."""
    found = _all(run_dir)
    return found[-1] if found else None


def newest_good(run_dir: Path, device: torch.device | str = "cpu") -> Found | None:
    """The newest snapshot of a run that is whole; None where there is none at all.

    Where several processes resume, one of them calls this and tells the others the step; they
    `load` the file at `path_of` that step, so that all go on from the same one.

    Raises:
        SnapshotError: every snapshot is damaged.
    """
    files = _all(run_dir)
    damaged: list[Path] = []
    for step, path in reversed(files):
        try:
            state = load(path, device)
        except (Damaged, OSError):
            damaged.append(path)
            continue
        warnings = tuple(
            f"snapshot {str(bad)!r} is damaged; going on from {str(path)!r}, step {step}"
            for bad in damaged
        )
        return Found(step, path, state, warnings)
    if not files:
        return None
    names = ", ".join(repr(str(path)) for path in damaged)
    raise SnapshotError(
        f"every snapshot of this run is damaged: {names}; remove them to start afresh"
    )


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a snapshot, refusing anything that could run code, and anything that was changed.

    torch.load does not verify the checksums in its files, so that a flipped bit would become a
    wrong weight in silence. A SHA-256 of all that it wrote stands behind it and is verified first.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: a file whose bytes are not those that were written, or that is no snapshot.
    """
    if not _is_whole(path):
        raise Damaged(f"snapshot {str(path)!r} is damaged; remove it to go on from the one before")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # Whole, but not written by `save`. Torch's own message tells how to switch safety off.
        raise Damaged(f"{str(path)!r} is not a snapshot of this program") from error
    if not isinstance(state, dict) or "student" not in state or "step" not in state:
        raise Damaged(f"{str(path)!r} is not a snapshot of this program")
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb", buffering=0) as file:
        sink = _Sink(file)
        torch.save(state, cast(IO[bytes], sink))
        sink.write(_MARK + sink.digest.digest())
        if sink.error is not None:
            raise sink.error
        os.fsync(file.fileno())


def _is_whole(path: Path) -> bool:
    """Whether the file ends in the digest of what stands before it."""
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - _TRAILER_BYTES
        if left < 0:
            return False
        file.seek(0)
        digest = hashlib.sha256(_MARK)
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
        return file.read() == _MARK + digest.digest()


class _Sink:
    """A file for torch.save that keeps a digest, and the first error instead of raising it.

    An exception on its way through torch.save's C++ writer comes out as an internal error about
    positions; the operating system's own words are wanted.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.digest = hashlib.sha256(_MARK)
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Writes all of `content`, until something has failed; always says that it did."""
        left = memoryview(content).cast("B")
        whole = len(left)
        self.digest.update(left)
        try:
            while left and self.error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
        return whole

    def flush(self) -> None:
        """Does nothing: nothing is held back."""


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
