"""Pictures in folders and tar files, as sequences of encoded bytes."""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from backbone.pictures import SUFFIXES

_SUFFIXES = SUFFIXES | {".npy"}  # uint8 [H, W, C], for channels that no picture format knows


class DataError(ValueError):
    """A source of pictures that cannot be used; the message names it and says what was expected."""


class Pictures(Protocol):
    """A sequence of encoded pictures.

    Attributes:
        names: of each picture, its path below the folder or inside the tar file.
    """

    names: Sequence[str]

    def read(self, i: int) -> bytes:
        """The encoded bytes of picture `i`; safe to call from any process."""


class FolderPictures:
    """Every picture below a folder, nested or flat, in the order of their paths."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names: Sequence[str] = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if _is_picture(path.relative_to(folder).as_posix()) and path.is_file()
        )

    def read(self, i: int) -> bytes:
        """The bytes of file `i`."""
        return (self._folder / self.names[i]).read_bytes()


class TarPictures:
    """Every picture in a tar file, read in place by offset.

    A compressed tar has no offsets to read at: it is unpacked once, as a whole, into a temporary
    file that is removed when this object or the process ends.

    Raises:
        DataError: a file that is not a tar.
    """

    def __init__(self, path: Path) -> None:
        decompress = _decompressor(path)
        self._path = path if decompress is None else self._unpack(path, decompress)
        try:
            with tarfile.open(self._path, "r:") as tar:
                members = _members(tar)
        except tarfile.ReadError as error:
            raise DataError(
                f"{str(path)!r} is neither a folder nor a whole tar file "
                f"(plain, gzip, bzip2 or xz): {error}"
            ) from error
        self.names: Sequence[str] = [name for name, _, _ in members]
        self._places = [(offset, size) for _, offset, size in members]
        self._file: tuple[int, int] | None = None

    def read(self, i: int) -> bytes:
        """The bytes of member `i`."""
        offset, size = self._places[i]
        if self._file is None or self._file[0] != os.getpid():
            # One file for each process: a descriptor that was inherited may have been closed.
            self._file = (os.getpid(), os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
            weakref.finalize(self, _close, *self._file)
        return os.pread(self._file[1], size, offset)

    def _unpack(self, path: Path, decompress: Callable[[Path], BinaryIO]) -> Path:
        folder = tempfile.mkdtemp(prefix="dinoscope-tar-")
        weakref.finalize(self, _remove, os.getpid(), folder)
        unpacked = Path(folder) / "pictures.tar"
        try:
            with decompress(path) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            # bz2 tells damage by a bare OSError, which is a full disk's too.
            raise DataError(f"{str(path)!r} cannot be unpacked into {folder}: {error}") from error
        return unpacked


class JoinedPictures:
    """Several sources one after the other."""

    def __init__(self, parts: Sequence[Pictures]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part.names) for part in parts))
        self.names: Sequence[str] = [name for part in parts for name in part.names]

    def read(self, i: int) -> bytes:
        """The bytes of picture `i`, counted over all parts."""
        part = bisect_right(self._ends, i)
        return self._parts[part].read(i - (self._ends[part - 1] if part else 0))


class SomePictures:
    """Those of another source that stand at `places`."""

    def __init__(self, whole: Pictures, places: Sequence[int]) -> None:
        self._whole = whole
        self._places = places
        self.names: Sequence[str] = [whole.names[i] for i in places]

    def read(self, i: int) -> bytes:
        """The bytes of the i-th chosen picture."""
        return self._whole.read(self._places[i])


def every(pictures: Pictures, count: int) -> Pictures:
    """At most `count` of the pictures, evenly spaced."""
    whole = len(pictures.names)
    if whole <= count:
        return pictures
    return SomePictures(pictures, [i * whole // count for i in range(count)])


def open_pictures(paths: Sequence[str | Path]) -> Pictures:
    """Opens folders and tar files (compressed or not) as one sequence.

    Raises:
        DataError: a path that does not exist, is neither, or holds no picture.
    """
    parts: list[Pictures] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{str(path)!r} does not exist; expected a folder or a tar file")
        part = FolderPictures(path) if path.is_dir() else TarPictures(path)
        if not part.names:
            kinds = ", ".join(sorted(_SUFFIXES))
            raise DataError(f"{str(path)!r} holds no picture ({kinds})")
        parts.append(part)
    return parts[0] if len(parts) == 1 else JoinedPictures(parts)


def class_labels(pictures: Pictures, *, where: str) -> list[str]:
    """The class of each picture: the name of the folder that it lies in.

    Raises:
        DataError: a picture that lies in no folder; `where` names the source in the message.
    """
    labels = [PurePosixPath(name).parent.name for name in pictures.names]
    if "" in labels:
        name = pictures.names[labels.index("")]
        raise DataError(f"{name!r} in {where} lies in no class folder; expected CLASS/PICTURE")
    return labels


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in _SUFFIXES and not any(
        part.startswith(".") for part in path.parts if part not in (".", "..")
    )


def _members(tar: tarfile.TarFile) -> list[tuple[str, int, int]]:
    return [
        (member.name, member.offset_data, member.size)
        for member in tar
        if member.isfile() and _is_picture(member.name)
    ]


def _decompressor(path: Path) -> Callable[[Path], BinaryIO] | None:
    with path.open("rb") as file:
        magic = file.read(6)
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    return next((opener for start, opener in openers.items() if magic.startswith(start)), None)


def _close(pid: int, descriptor: int) -> None:
    if pid == os.getpid():
        os.close(descriptor)


def _remove(pid: int, folder: str) -> None:
    if pid == os.getpid():
        shutil.rmtree(folder)
