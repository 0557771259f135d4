"""A folder with one owner, whose sub-folders appear and vanish as a whole."""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index.errors import StoreFailed, StoreInUse

LOCK_FILE = "LOCK"
_UNFINISHED = ".new-"
_DISCARDED = ".deleted-"
_logger = logging.getLogger(__name__)


class OwnedFolder:
    """Takes `root` (made if absent) for itself and clears what an earlier crash left behind.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        StoreInUse: somebody else has it, in this process or in another.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        _fsync(root.parent)
        self._lock_file = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take_lock()
            for path in root.iterdir():
                if path.name.startswith((_UNFINISHED, _DISCARDED)):
                    shutil.rmtree(path)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._owned = True

    def subfolders(self) -> list[str]:
        """The names of the sub-folders, sorted."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def has(self, name: str) -> bool:
        """Whether anything, folder or not, goes by this name."""
        return os.path.lexists(self.root / name)

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Fill a new sub-folder under a hidden name; it takes its own name at the block's end."""
        self._check_owned()
        hidden = self.root / f"{_UNFINISHED}{uuid.uuid4().hex}"
        with _refusals_named(f"{name!r} could not be made"):
            hidden.mkdir()
            try:
                yield hidden
                _fsync(hidden)
                hidden.rename(self.root / name)
            except BaseException:
                shutil.rmtree(hidden)
                raise
            _fsync(self.root)

    def remove(self, name: str) -> None:
        """Remove a sub-folder: gone as a whole, and for good, when this returns."""
        self._check_owned()
        discarded = self.root / f"{_DISCARDED}{uuid.uuid4().hex}"
        with _refusals_named(f"{name!r} could not be removed"):
            (self.root / name).rename(discarded)
            _fsync(self.root)
        try:
            shutil.rmtree(discarded)
        except OSError:
            # The folder has lost its name and does not come back; only its space is still taken.
            _logger.warning("%s will be cleared at the next start", discarded, exc_info=True)

    def release(self) -> None:
        """Let others have the folder. Releasing twice is allowed."""
        if self._owned:
            self._owned = False
            # By hand: a forked child that still has the file open would keep the lock alive.
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)
            os.close(self._lock_file)

    def _check_owned(self) -> None:
        if not self._owned:
            raise RuntimeError(f"{self.root} has been closed")

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock_file, 32, 0).decode("ascii", "replace").strip()
            raise StoreInUse(
                f"{self.root} is in use by process {owner or '(unknown)'}; "
                "one process at a time can own a folder of collections"
            ) from error
        os.ftruncate(self._lock_file, 0)
        os.pwrite(self._lock_file, f"{os.getpid()}\n".encode(), 0)


@contextmanager
def _refusals_named(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{what}: {error.strerror or error}") from error


def _fsync(folder: Path) -> None:
    """Put a folder's list of names on disk; without it a rename may not survive power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
