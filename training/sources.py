"""Pictures in folders, lists, tar and Parquet files, as sequences of encoded bytes."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Protocol

from training import parquet, tars
from training.picture_files import SUFFIXES, DataError, is_hidden, is_picture

__all__ = [
    "DataError",
    "FolderPictures",
    "JoinedPictures",
    "ListedPictures",
    "Pictures",
    "SomePictures",
    "class_labels",
    "every",
    "find_shards",
    "open_pictures",
]

LIST_SUFFIX = ".txt"
SHARD_SUFFIXES = (*tars.SUFFIXES, parquet.SUFFIX)


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
            if is_picture(path.relative_to(folder).as_posix()) and path.is_file()
        )

    def read(self, i: int) -> bytes:
        """The bytes of file `i`."""
        return (self._folder / self.names[i]).read_bytes()


class ListedPictures:
    """The files that a text file names, one a line, in its order.

    Paths are relative to the list's folder. Blank lines, and those that begin with `#`, are
    skipped.

    Raises:
        DataError: a line that names no file, or a list that is not text in UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        self.names: Sequence[str] = list(self._lines(path))

    def read(self, i: int) -> bytes:
        """The bytes of the file on the i-th line that names one."""
        return (self._folder / self.names[i]).read_bytes()

    def _lines(self, path: Path) -> Iterator[str]:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{str(path)!r} is not text in UTF-8: {error}") from error
        for number, line in enumerate(text.split("\n"), 1):
            name = line.strip()
            if not name or name.startswith("#"):
                continue
            if not (self._folder / name).is_file():
                raise DataError(
                    f"line {number} of {str(path)!r} names {name!r}, which is no file; "
                    f"paths are relative to {str(self._folder)!r}"
                )
            yield name


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
    """Opens folders, tar and Parquet files, and `.txt` lists of files as one sequence.

    A folder that holds tar or Parquet files, and no pictures, stands for them in the order of
    their paths.

    Raises:
        DataError: a path that does not exist, is none of these, or holds no picture.
    """
    row_groups = parquet.RowGroups()
    parts = [part for path in paths for part in _open(Path(path), row_groups)]
    return parts[0] if len(parts) == 1 else JoinedPictures(parts)


def find_shards(paths: Sequence[str | Path]) -> list[Path]:
    """The tar and Parquet files that `paths` name, or that lie in folders that they name.

    Raises:
        DataError: a path that does not exist, or names none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        _require(path)
        shards = _shards_below(path) if path.is_dir() else [path]
        if not shards or path.suffix.lower() == LIST_SUFFIX:
            raise DataError(
                f"{str(path)!r} is no shard and holds none ({', '.join(SHARD_SUFFIXES)}); "
                "only shards are streamed: leave out data.stream"
            )
        found += shards
    return found


def _shards_below(folder: Path) -> list[Path]:
    """The tar and Parquet files in a folder, nested or flat, in the order of their paths."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(SHARD_SUFFIXES)
        and not is_hidden(path.relative_to(folder).as_posix())
        and path.is_file()
    )


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


def _open(path: Path, row_groups: parquet.RowGroups) -> list[Pictures]:
    _require(path)
    parts = [_open_one(path, row_groups)]
    if path.is_dir() and not parts[0].names:
        parts = [_open_one(shard, row_groups) for shard in _shards_below(path)]
    parts = [part for part in parts if part.names]
    if not parts:
        raise DataError(f"{str(path)!r} holds no picture ({', '.join(sorted(SUFFIXES))})")
    return parts


def _open_one(path: Path, row_groups: parquet.RowGroups) -> Pictures:
    if path.is_dir():
        return FolderPictures(path)
    if path.suffix.lower() == LIST_SUFFIX:
        return ListedPictures(path)
    if path.suffix.lower() == parquet.SUFFIX:
        return parquet.ParquetPictures(path, row_groups)
    return tars.TarPictures(path)


def _require(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"{str(path)!r} does not exist; expected a folder, a tar or Parquet file, or a list"
        )
