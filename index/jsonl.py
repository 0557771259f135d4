"""Exports as JSON lines: the header, one record a line, and a last line that counts them.

    {"format": "dinoscope-collection", "version": 1, "model": ..., "metric": ..., "spaces": {...}}
    {"id": "a.jpg", "metadata": {...}, "content_hash": ..., "vectors": {"cls": [0.25, ...]}}
    {"records": 1}

The count is there because a text that is cut at the end of a line looks whole. Of a record, only
id and vectors must be there; `thumbnail` is base64; `created_at` and `updated_at` (Unix seconds)
are for people, and an import does not read them.
"""

import base64
import codecs
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from index.errors import ImportFailed, InvalidRecord
from index.exported import ExportedRecord, Header, Placed, check_keys, parse_object
from index.records import NewRecord

MAX_LINE_BYTES = 2**26
_REQUIRED = {"id", "vectors"}
_OPTIONAL = {"metadata", "content_hash", "thumbnail", "created_at", "updated_at"}


def write_jsonl(header: Header, records: Iterable[ExportedRecord], file: BinaryIO) -> int:
    """Write an export, a record at a time; how many records.

    Raises:
        InvalidRecord: a record's line is longer than an import reads.
    """
    count = 0
    file.write(f"{header.to_json()}\n".encode())
    for exported in records:
        line = _to_line(exported)
        if len(line) > MAX_LINE_BYTES:
            raise InvalidRecord(
                f"record {exported.record.id!r} takes {len(line)} bytes; a line of an export may "
                f"have {MAX_LINE_BYTES}"
            )
        file.write(line)
        count += 1
    file.write(f'{{"records": {count}}}\n'.encode())
    return count


def read_jsonl(file: BinaryIO, source: str) -> tuple[Header, Placed]:
    """The header of an export, and its records, read as they are asked for.

    A byte order mark, CRLF and blank lines are allowed.

    Args:
        file: from its present position to its end.
        source: what errors call it.

    Raises:
        ImportFailed: here, or later while the records are read; it names the line.
    """
    lines = _lines(file, source)
    first = next(lines, None)
    if first is None:
        raise ImportFailed(f"{source}: it is empty; the first line must be the header")
    at, line = first
    return Header.from_json(line, at), _records(lines, source)


def _to_line(exported: ExportedRecord) -> bytes:
    record, thumbnail = exported.record, exported.thumbnail
    head: dict[str, Any] = {
        "id": record.id,
        "metadata": record.metadata,
        "content_hash": record.content_hash,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
    }
    if thumbnail is not None:
        head["thumbnail"] = base64.b64encode(thumbnail).decode("ascii")
    text = json.dumps(head, ensure_ascii=False, allow_nan=False)
    vectors = ", ".join(f'"{space}": [{_to_text(v)}]' for space, v in record.vectors.items())
    return f'{text[:-1]}, "vectors": {{{vectors}}}}}\n'.encode()


def _to_text(vector: NDArray[np.float32]) -> str:
    # Nine digits tell any two float32 apart, and stay so near the value that a reader who goes by
    # way of float64 (as JSON's do) comes back to the same one; the fewest digits that tell them
    # apart do not always: 7.038531e-26. "%.9g" of minus zero would be read as an integer.
    return ",".join([f"{value:.9g}" if value else repr(value) for value in vector.tolist()])


def _lines(file: BinaryIO, source: str) -> Iterator[tuple[str, bytes]]:
    for number in itertools.count(1):
        at = f"{source}, line {number}"
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:  # the latter two: damaged gzip
            raise ImportFailed(f"{at}: cannot be read: {error}") from error
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise ImportFailed(f"{at}: it is longer than {MAX_LINE_BYTES} bytes")
        if not line.endswith(b"\n"):
            at += ", where the file ends"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            yield at, line


def _records(lines: Iterator[tuple[str, bytes]], source: str) -> Placed:
    count = 0
    for at, line in lines:
        found = parse_object(line, at)
        if found.keys() == {"records"}:
            if found["records"] != count:
                raise ImportFailed(f"{at}: it counts {found['records']!r} records, not {count}")
            if (after := next(lines, None)) is not None:
                raise ImportFailed(f"{after[0]}: it stands after the line that counts the records")
            return
        yield at, _from_object(found, at)
        count += 1
    raise ImportFailed(
        f'{source}: its last line, {{"records": {count}}}, is missing: the file was cut short'
    )


def _from_object(found: dict[str, Any], at: str) -> NewRecord:
    check_keys(found, required=_REQUIRED, optional=_OPTIONAL, at=at)
    if not isinstance(found["vectors"], dict):
        raise ImportFailed(f"{at}: vectors must map a space to its vector")
    return NewRecord(
        id=found["id"],
        vectors={space: _vector(each, space, at) for space, each in found["vectors"].items()},
        metadata=found.get("metadata", {}),
        content_hash=found.get("content_hash"),
        thumbnail=_thumbnail(found["thumbnail"], at) if "thumbnail" in found else None,
    )


def _vector(numbers: object, space: str, at: str) -> NDArray[np.float64]:
    # Each element's type is looked at because numpy takes true for 1.
    if not isinstance(numbers, list) or not {*map(type, numbers)} <= {int, float}:
        raise ImportFailed(f"{at}: the vector of space {space[:60]!r} is not a list of numbers")
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError as error:
        raise ImportFailed(f"{at}: space {space[:60]!r}: {error}") from error


def _thumbnail(text: object, at: str) -> bytes:
    if not isinstance(text, str):
        raise ImportFailed(f"{at}: thumbnail must be base64, got {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImportFailed(f"{at}: thumbnail is not base64: {error}") from error
