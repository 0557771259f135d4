"""Exports as Parquet: a row for each record, in the layout that dataframes and vector stores read.

Columns: id, metadata (JSON), content_hash, thumbnail, created_at and updated_at (Unix seconds), and
for each space `vector_SPACE`, a list of fixed length of float32. The header stands in the schema's
metadata under `dinoscope-collection`. The number of records stands in the file's, under
`dinoscope-records`: a writer that fails closes its file all the same, and it would look whole.

pyarrow is an extra, imported where it is used.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from index.errors import FormatUnavailable, ImportFailed
from index.exported import FORMAT, ExportedRecord, Header, Placed, parse_object
from index.records import NewRecord

_COUNT = "dinoscope-records"
_ROWS_PER_GROUP = 4096
_VECTOR_BYTES_PER_GROUP = 2**26  # of the longest vectors, fewer rows
_ROWS_PER_BATCH = 256


def write_parquet(header: Header, records: Iterable[ExportedRecord], file: BinaryIO) -> int:
    """Write an export, a row group at a time; how many records.

    Raises:
        FormatUnavailable: without pyarrow.
    """
    pyarrow, parquet = _import_pyarrow()
    schema = _schema(pyarrow, header)
    row_bytes = 4 * sum(header.spaces.values())
    size = max(1, min(_ROWS_PER_GROUP, _VECTOR_BYTES_PER_GROUP // row_bytes))
    left, count = iter(records), 0
    # Vectors do not repeat, so a dictionary would only cost time.
    with parquet.ParquetWriter(
        file, schema, use_dictionary=False, write_page_checksum=True
    ) as writer:
        while group := list(islice(left, size)):
            writer.write_table(_table(pyarrow, schema, header, group), row_group_size=size)
            count += len(group)
        writer.add_key_value_metadata({_COUNT: str(count)})
    return count


def read_parquet(file: BinaryIO, source: str) -> tuple[Header, Placed]:
    """The header of an export, and its records, read as they are asked for.

    Args:
        file: read at any position.
        source: what errors call it.

    Raises:
        FormatUnavailable: without pyarrow.
        ImportFailed: here, or later while the records are read; it names the row, from 1.
    """
    pyarrow, parquet = _import_pyarrow()
    with _faults_named(pyarrow, source):
        opened = parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
    described = (opened.schema_arrow.metadata or {}).get(FORMAT.encode())
    if described is None:
        raise ImportFailed(f"{source}: expected the schema's metadata to hold {FORMAT!r}")
    header = Header.from_json(described, f"{source}, {FORMAT!r} in the schema's metadata")
    _check_columns(opened.schema_arrow, _schema(pyarrow, header), source)
    if (opened.metadata.metadata or {}).get(_COUNT.encode()) != b"%d" % opened.metadata.num_rows:
        raise ImportFailed(
            f"{source}: expected {_COUNT!r} to be {opened.metadata.num_rows} in the file's "
            "metadata; the export did not come to its end"
        )
    return header, _records(pyarrow, opened, header, source)


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FormatUnavailable(
            "the format 'parquet' takes pyarrow; pip install 'dinoscope[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _schema(pyarrow: Any, header: Header) -> Any:
    columns = [
        pyarrow.field("id", pyarrow.string(), nullable=False),
        pyarrow.field("metadata", pyarrow.string(), nullable=False),
        pyarrow.field("content_hash", pyarrow.string()),
        pyarrow.field("thumbnail", pyarrow.binary()),
        pyarrow.field("created_at", pyarrow.float64()),
        pyarrow.field("updated_at", pyarrow.float64()),
    ]
    for space, dimension in header.spaces.items():
        kind = pyarrow.list_(pyarrow.float32(), dimension)
        columns.append(pyarrow.field(_column(space), kind, nullable=False))
    return pyarrow.schema(columns, metadata={FORMAT: header.to_json()})


def _column(space: str) -> str:
    # With a prefix, as a space may be called "id".
    return f"vector_{space}"


def _table(pyarrow: Any, schema: Any, header: Header, group: list[ExportedRecord]) -> Any:
    records = [each.record for each in group]
    columns = [
        [record.id for record in records],
        [json.dumps(record.metadata, ensure_ascii=False, allow_nan=False) for record in records],
        [record.content_hash for record in records],
        [each.thumbnail for each in group],
        [record.created_at for record in records],
        [record.updated_at for record in records],
    ]
    arrays = [
        pyarrow.array(column, field.type)
        for column, field in zip(columns, schema, strict=False)  # the spaces follow
    ]
    for space, dimension in header.spaces.items():
        numbers = np.concatenate([record.vectors[space] for record in records])
        arrays.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(numbers), dimension))
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def _check_columns(found: Any, expected: Any, source: str) -> None:
    unknown = sorted(set(found.names) - set(expected.names))
    if unknown:
        raise ImportFailed(f"{source}: unknown columns {unknown}; there may be {expected.names}")
    for field in expected:
        number = found.names.count(field.name)
        if number != 1:
            raise ImportFailed(f"{source}: expected one column {field.name!r}, got {number}")
        kind = found.field(field.name).type
        if kind != field.type:
            raise ImportFailed(
                f"{source}: expected column {field.name!r} to be {field.type}, got {kind}"
            )


def _records(pyarrow: Any, opened: Any, header: Header, source: str) -> Placed:
    row = 0
    batches = opened.iter_batches(batch_size=_ROWS_PER_BATCH, use_threads=False)
    while True:
        with _faults_named(pyarrow, f"{source}, after row {row}"):
            batch = next(batches, None)
        if batch is None:
            return
        try:
            texts = {
                name: batch.column(name).to_pylist()
                for name in ("id", "metadata", "content_hash", "thumbnail")
            }
        except UnicodeDecodeError as error:
            raise ImportFailed(f"{source}, after row {row}: not UTF-8: {error.reason}") from error
        vectors = {
            space: _vectors(batch.column(_column(space)), dimension)
            for space, dimension in header.spaces.items()
        }
        for i in range(batch.num_rows):
            row += 1
            at = f"{source}, row {row}"
            if texts["metadata"][i] is None:
                raise ImportFailed(f"{at}: metadata is null")
            yield (
                at,
                NewRecord(
                    id=texts["id"][i],
                    vectors={space: rows[i] for space, rows in vectors.items()},
                    metadata=parse_object(texts["metadata"][i].encode(), f"{at}, metadata"),
                    content_hash=texts["content_hash"][i],
                    thumbnail=texts["thumbnail"][i],
                ),
            )


def _vectors(column: Any, dimension: int) -> NDArray[np.float32]:
    """[rows, dimension]. A null, in place of a number or of a vector, is NaN: no record has one."""
    numbers = column.fill_null([float("nan")] * dimension) if column.null_count else column
    flat: NDArray[np.float32] = numbers.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32, copy=False).reshape(-1, dimension)


@contextmanager
def _faults_named(pyarrow: Any, at: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise ImportFailed(f"{at}: not a whole Parquet file: {error}") from error
