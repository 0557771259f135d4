"""A folder with one owner, whose sub-folders appear and vanish as a whole."""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index.durable import fsync, refusals_named
from index.errors import StoreInUse

LOCK_FILE = "LOCK"
# The names of what is hidden begin with a dot, which no collection's name does.
_UNFINISHED = ".new-"
_DISCARDED = ".deleted-"
_REPLACED = ".replaced-"
_logger = logging.getLogger(__name__)


class OwnedFolder:
    """Takes `root` (made if absent) for itself and clears what an earlier crash left behind.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        StoreInUse: somebody else has it, in this process or in another.
        StoreFailed: the operating system refused.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with refusals_named(f"the folder of collections {root} could not be opened"):
            missing = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
            for folder in (root, *missing):
                fsync(folder.parent)
            self._lock_file = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take_lock()
                self._clear_what_a_crash_left()
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
        """Fill a new sub-folder under a hidden name; it takes its own name at the block's end.

        The files in it are for the block to put on disk.
        """
        self._check_owned()
        with refusals_named(f"{name!r} could not be made"), self._filling() as filled:
            yield filled
            fsync(filled)
            filled.rename(self.root / name)
            fsync(self.root)

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """`making`, but in the place of the sub-folder of that name, if there is one.

        A crash at any moment leaves the old one or the new one, whole, and so does an error. Nobody
        may have the old one open at the block's end.
        """
        self._check_owned()
        with refusals_named(f"{name!r} could not be replaced"):
            self._settle(name)
            with self._filling() as filled:
                yield filled
                fsync(filled)
                try:
                    if self.has(name):
                        (self.root / name).rename(self._aside(name))
                        fsync(self.root)
                    filled.rename(self.root / name)  # from here on the new one counts
                    fsync(self.root)
                finally:
                    self._settle(name)

    def remove(self, name: str) -> None:
        """Remove a sub-folder: gone as a whole, and for good, when this returns."""
        self._check_owned()
        with refusals_named(f"{name!r} could not be removed"):
            self._settle(name)  # or the one it replaced would come back
            self._discard(self.root / name)

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

    @contextmanager
    def _filling(self) -> Iterator[Path]:
        """A new hidden folder; after an error it is gone, unless it has another name by then."""
        hidden = self.root / f"{_UNFINISHED}{uuid.uuid4().hex}"
        hidden.mkdir()
        try:
            yield hidden
        except BaseException:
            if hidden.exists():
                shutil.rmtree(hidden)
            raise

    def _aside(self, name: str) -> Path:
        return self.root / f"{_REPLACED}{name}"

    def _settle(self, name: str) -> None:
        """End a replacement that was begun: the old one goes, or comes back if no new one came."""
        if os.path.lexists(self._aside(name)):
            if self.has(name):
                self._discard(self._aside(name))
            else:
                self._aside(name).rename(self.root / name)
                fsync(self.root)

    def _discard(self, path: Path) -> None:
        discarded = self.root / f"{_DISCARDED}{uuid.uuid4().hex}"
        path.rename(discarded)
        fsync(self.root)
        try:
            _remove(discarded)
        except OSError:
            # The folder has lost its name and does not come back; only its space is still taken.
            _logger.warning("%s will be cleared at the next start", discarded, exc_info=True)

    def _clear_what_a_crash_left(self) -> None:
        for path in list(self.root.iterdir()):
            if path.name.startswith(_REPLACED):
                self._settle(path.name.removeprefix(_REPLACED))
            elif path.name.startswith((_UNFINISHED, _DISCARDED)):
                _remove(path)

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


def _remove(path: Path) -> None:
    """A folder with all in it; of a link to one elsewhere, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
