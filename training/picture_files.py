"""What every source of pictures shares: its error, and which files are pictures."""

from pathlib import PurePosixPath

from backbone import pictures

SUFFIXES = pictures.SUFFIXES | {".npy"}
"""Of what is read for training: `.npy` files, uint8 [H, W, C], have channels beyond formats'."""


class DataError(ValueError):
    """A source of pictures that cannot be used; the message names it and says what was expected."""


def is_picture(name: str) -> bool:
    """Whether the path `name` looks like a picture's: by its suffix, and nothing in it hidden."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a part of the path `name` begins with a dot."""
    return any(
        part.startswith(".") for part in PurePosixPath(name).parts if part not in (".", "..")
    )
