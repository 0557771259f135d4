"""Exports as files: the name tells the format, and a file under its own name is whole."""

import errno
import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from index.errors import FormatUnavailable
from index.transfer import Format

# suffix -> format, and whether gzip is around it
_SUFFIXES = MappingProxyType[str, tuple[Format, bool]](
    {".jsonl": ("jsonl", False), ".jsonl.gz": ("jsonl", True), ".parquet": ("parquet", False)}
)
_GZIP_LEVEL = 1  # digits hardly repeat: higher levels take 2 to 18 times as long for 4% less


@contextmanager
def writing_export(path: Path) -> Iterator[tuple[BinaryIO, Format]]:
    """A new file to write to, and its format; under its own name and on disk at the block's end.

    When the block raises, nothing is left.

    Raises:
        FormatUnavailable: the name ends in no known suffix.
        OSError: `path` exists already, or cannot be written.
    """
    format, is_packed = _format_of(path)  # noqa: A001
    if path.exists():
        raise FileExistsError(errno.EEXIST, "it exists already", str(path))
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            if is_packed:
                with (
                    gzip.GzipFile("", "wb", _GZIP_LEVEL, file) as packed,
                    io.BufferedWriter(packed) as buffered,
                ):
                    yield buffered, format
            else:
                yield file, format
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_names(path.parent)


@contextmanager
def reading_export(path: Path) -> Iterator[tuple[BinaryIO, Format]]:
    """A file to read from, and its format; raises as `writing_export`."""
    format, is_packed = _format_of(path)  # noqa: A001
    with path.open("rb") as file:
        if is_packed:
            with io.BufferedReader(gzip.GzipFile(fileobj=file)) as unpacked:
                yield unpacked, format
        else:
            yield file, format


def _format_of(path: Path) -> tuple[Format, bool]:
    for suffix, kind in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return kind
    raise FormatUnavailable(
        f"{str(path)!r}: the name of an export must end in one of {', '.join(_SUFFIXES)}"
    )


def _sync_names(folder: Path) -> None:
    """Without it the new name may not survive power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
