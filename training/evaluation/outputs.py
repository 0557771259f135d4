"""What an evaluation writes: whether it can is found out before the work, and not after it."""

import tempfile
from pathlib import Path

from training.config import ConfigError


def check_file(option: str, path: Path) -> None:
    """Makes the folder of a file that will be written, and writes a file that stays nameless there.

    Args:
        option: that names the file, for the message.

    Raises:
        ConfigError: the file could not be written; names the option, the file and the reason.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; expected a file's name")
    _try(option, path, path.parent)


def check_folder(option: str, path: Path) -> None:
    """The same for a folder that files will be written into.

    Raises:
        ConfigError: they could not be.
    """
    _try(option, path, path)


def _try(option: str, path: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error}") from error
