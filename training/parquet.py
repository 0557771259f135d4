"""Parquet files of pictures, as Hugging Face's `datasets` writes them.

A column `image` holds the encoded bytes, bare or as a struct of `bytes` and `path`; a column
`label`, where there is one, the class. Reading them takes pyarrow, an optional dependency.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from training.picture_files import DataError

SUFFIX = ".parquet"

_BINARY = frozenset({"binary", "large_binary"})


class RowGroups:
    """The row groups that were read last, of any number of files: `limit` at most.

    Reading a picture means reading its whole row group, often a hundred pictures or more.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def get(self, path: Path, group: int, read: Callable[[], Any]) -> Any:
        """Row group `group` of the file `path`; `read` reads it where it is not held."""
        key = (path, group)
        if key not in self._held:
            while len(self._held) >= self._limit:
                self._held.popitem(last=False)
            self._held[key] = read()
        self._held.move_to_end(key)
        return self._held[key]


class ParquetPictures:
    """Every picture in a Parquet file.

    Names are the paths in the file, or the rows' numbers where it holds none; where it has labels,
    each name is `LABEL/` and the last part of the path.

    Args:
        row_groups: shared by the files of a data set, so that they do not hold one more each.

    Raises:
        DataError: pyarrow is not installed, the file is not Parquet, or has no such column.
    """

    def __init__(self, path: Path, row_groups: RowGroups) -> None:
        self._path = path
        self._row_groups = row_groups
        with _open(path) as file:
            self._metadata = file.metadata
            self._wanted = _bytes_column(path, file.schema_arrow)
            self.names: Sequence[str] = _names(file)
        groups = range(self._metadata.num_row_groups)
        self._ends = list(accumulate(self._metadata.row_group(g).num_rows for g in groups))

    def read(self, i: int) -> bytes:
        """The bytes in row `i`; none where it is null.

        Raises:
            DataError: a damaged row group.
        """
        group = bisect_right(self._ends, i)
        column = self._row_groups.get(self._path, group, partial(self._read, group))
        content: bytes | None = column[i - (self._ends[group - 1] if group else 0)].as_py()
        return content or b""

    def _read(self, group: int) -> Any:
        # Opened anew, and without threads: what is open or running does not outlive a fork.
        with _open(self._path, metadata=self._metadata) as file:
            table = file.read_row_group(group, columns=[self._wanted], use_threads=False)
        return table.flatten().column(0)


def read_through(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The pictures of a Parquet file from front to back, one row group in memory at a time.

    Gives each one's name, and a way to its bytes. Raises `DataError` as `ParquetPictures`.
    """
    pictures = ParquetPictures(path, RowGroups(1))
    for i, name in enumerate(pictures.names):
        yield name, partial(pictures.read, i)


def row_count(path: Path) -> int:
    """The number of pictures, from the file's end alone; raises `DataError` as above."""
    with _open(path) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _open(path: Path, **settings: Any) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{str(path)!r}: reading Parquet takes pyarrow; pip install 'dinoscope[parquet]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path, **settings) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{str(path)!r} is not a whole Parquet file: {error}") from error


def _bytes_column(path: Path, schema: Any) -> str:
    """The column, or the part of it, that holds the encoded bytes."""
    kinds = {field.name: field.type for field in schema}
    kind = kinds.get("image")
    if str(kind) in _BINARY:
        return "image"
    if any(part.name == "bytes" and str(part.type) in _BINARY for part in _parts(kind)):
        return "image.bytes"
    found = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    raise DataError(
        f"{str(path)!r} has no column 'image' of encoded pictures "
        f"(binary, or a struct of bytes and path); its columns are {found}"
    )


def _parts(kind: Any) -> list[Any]:
    return list(kind) if str(kind).startswith("struct<") else []


def _names(file: Any) -> list[str]:
    schema = file.schema_arrow
    wanted = [name for name in ("label",) if name in schema.names]
    wanted += ["image.path" for part in _parts(schema.field("image").type) if part.name == "path"]
    rows = [f"{row:08d}" for row in range(file.metadata.num_rows)]
    if not wanted:
        return rows
    table = file.read(columns=wanted, use_threads=False).flatten()
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    paths = columns.get("image.path", rows)
    labels = columns.get("label", [None] * len(rows))
    return [_name(label, path or row) for label, path, row in zip(labels, paths, rows, strict=True)]


def _name(label: object, path: str) -> str:
    if label is None:
        return path
    return f"{str(label).replace('/', '_')}/{PurePosixPath(path).name}"
