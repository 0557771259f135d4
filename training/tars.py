"""Tar files of pictures, plain or compressed: read at random, or from front to back."""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from training.picture_files import DataError, is_picture

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)  # bz2 tells it by a bare OSError


class TarPictures:
    """Every picture in a tar file, read in place by offset.

    A compressed tar has no offsets to read at: it is unpacked once, as a whole, into a temporary
    file without a name. However the process ends, the file is gone with it; forked workers read it
    through the descriptor that they inherit, and no other kind of worker can.

    Raises:
        DataError: a file that is not a tar, or one that cannot be unpacked.
    """

    def __init__(self, path: Path) -> None:
        decompress = _decompressor(path)
        self._path = path
        self._unpacked: IO[bytes] | None = None
        if decompress is not None:
            self._unpacked = _unpack(path, decompress)
            weakref.finalize(self, self._unpacked.close)
        try:
            with tarfile.open(None if self._unpacked else path, "r:", self._unpacked) as tar:
                members = [(m.name, m.offset_data, m.size) for m in tar if _wanted(m)]
        except tarfile.ReadError as error:
            raise _no_tar(path, error) from error
        self.names: Sequence[str] = [name for name, _, _ in members]
        self._places = [(offset, size) for _, offset, size in members]

    def read(self, i: int) -> bytes:
        """The bytes of member `i`."""
        offset, size = self._places[i]
        if self._unpacked is not None:
            # Without a position of its own: processes that share the descriptor do not meet.
            return os.pread(self._unpacked.fileno(), size, offset)
        # Opened anew: a thousand shards would be more descriptors than a process may hold.
        with self._path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def read_through(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The pictures of a tar file from front to back: each one's name, and a way to its bytes.

    The way is open until the next picture is asked for. Nothing is unpacked to disk.

    Raises:
        DataError: as `TarPictures`, when the damage is reached.
    """
    with _damage_told(path):
        decompress = _decompressor(path) or _open_plain
        with decompress(path) as file, _Tar.open(None, "r:", file) as tar:
            while (member := tar.next()) is not None:
                if _wanted(member):
                    yield member.name, partial(_content, tar, member, path)
                tar.members.clear()  # they would be kept to the end: a tar may hold millions


class _Tar(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # which the type stubs leave out


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    with _damage_told(path):
        file = tar.extractfile(member)
        content = b"" if file is None else file.read()
        if len(content) != member.size:
            raise EOFError(f"{member.name!r} ends too early")
        return content


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.ReadError as error:
        raise _no_tar(path, error) from error
    except _DAMAGE as error:
        raise DataError(f"{str(path)!r} cannot be read to its end: {error}") from error


def _no_tar(path: Path, error: tarfile.ReadError) -> DataError:
    return DataError(
        f"{str(path)!r} is neither a folder nor a whole tar file "
        f"(plain, gzip, bzip2 or xz): {error}"
    )


def _wanted(member: tarfile.TarInfo) -> bool:
    return member.isreg() and is_picture(member.name)


def _unpack(path: Path, decompress: Callable[[Path], BinaryIO]) -> IO[bytes]:
    try:
        target = tempfile.TemporaryFile(prefix="dinoscope-tar-")  # noqa: SIM115, for the caller to close
        try:
            with decompress(path) as source:
                shutil.copyfileobj(source, target, 1 << 20)
            target.seek(0)
        except BaseException:
            target.close()
            raise
    except _DAMAGE as error:
        # OSErrors are also a full disk's, and those of too many open files.
        raise DataError(
            f"{str(path)!r} cannot be unpacked into {tempfile.gettempdir()}: {error}"
        ) from error
    return target


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _decompressor(path: Path) -> Callable[[Path], BinaryIO] | None:
    with path.open("rb") as file:
        magic = file.read(6)
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    return next((opener for start, opener in openers.items() if magic.startswith(start)), None)
