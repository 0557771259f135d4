"""What an evaluation writes: whether it can is found out before the work, and not after it."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.config import ConfigError


def check_file(option: str, path: Path) -> None:
    """Makes the folder of a file that will be written, and refuses one that could not be.

    Args:
        option: that names the file, for the message.

    Raises:
        ConfigError: names the option, the file and the reason.
    """
    with writing(option, path):
        _try(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it may not be written")


def check_folder(option: str, path: Path) -> None:
    """The same for a folder that files will be written into.

    Raises:
        ConfigError: names the option, the folder and the reason.
    """
    with writing(option, path):
        _try(path)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turns what the system says against writing `path` into a `ConfigError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{option}: {str(path)!r} cannot be written: {reason}") from error


def _try(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
