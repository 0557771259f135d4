"""Collections out to a file and in again, in formats that other programs read.

with path.open("xb") as file:
    export_records(collection, file, format="jsonl")
with path.open("rb") as file:
    import_new(collections, "copy", file, format="jsonl", source=str(path))

Memory is bounded by a page or a batch of records, and by the ids of what is imported.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, get_args

from index.collection import Collection
from index.collection_set import CollectionSet
from index.errors import (
    FormatUnavailable,
    ImportFailed,
    InvalidRecord,
    InvalidSettings,
    InvalidVector,
    ModelMismatch,
    RecordNotFound,
)
from index.exported import ExportedRecord, Header, Placed
from index.jsonl import read_jsonl, write_jsonl
from index.kinds import check_metric
from index.parquet import read_parquet, write_parquet
from index.records import NewRecord, Outcome, check_record

Format = Literal["jsonl", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Told of each record or batch that is done: how many they were.
Progress = Callable[[int], object]

_PAGE = 256  # records; of the longest vectors, 64 MiB
_BATCH = 1000  # records in one transaction
_OUTCOMES: tuple[Outcome, ...] = ("created", "updated", "unchanged")  # of an upsert that adds

_WRITERS = MappingProxyType({"jsonl": write_jsonl, "parquet": write_parquet})
_READERS = MappingProxyType({"jsonl": read_jsonl, "parquet": read_parquet})


def export_records(
    collection: Collection,
    file: BinaryIO,
    *,
    format: Format,  # noqa: A002
    filter: Mapping[str, Any] | None = None,  # noqa: A002
    progress: Progress = lambda count: None,
) -> int:
    """Write a collection's records to `file`, in order of first insertion; how many.

    With a `filter`, those whose metadata it lets through.

    Every record is whole, and as it was at some moment of the export. What is written or deleted
    meanwhile is in it or not; a copy of one moment is a snapshot.

    Raises:
        FormatUnavailable, InvalidRecord: it cannot be written in this format.
        InvalidFilter: naming what is wrong in `filter`.
        StoreDamaged, StoreFailed, CollectionNotFound: as with any use of a collection.
        OSError: the file cannot be written. After any error, it is not a whole export.
    """
    _check_format(format)
    header = Header(collection.model, collection.metric, collection.spaces)
    return _WRITERS[format](header, _exported(collection, filter, progress), file)


def import_records(
    collection: Collection,
    file: BinaryIO,
    *,
    format: Format,  # noqa: A002
    source: str = "the file",
    progress: Progress = lambda count: None,
) -> dict[str, int]:
    """Upsert what `export_records` wrote into a collection; outcome -> how many records.

    Records are written in batches. At the first fault it stops, and what stands before the fault
    is in the collection; importing the same file again does no harm. A record without a thumbnail
    leaves the one that it finds.

    Args:
        file: for "parquet", one that can be read at any position.
        source: what errors call the file.

    Raises:
        FormatUnavailable.
        ModelMismatch, InvalidVector: another model made the vectors, or the spaces differ; nothing
            was written.
        ImportFailed: naming the place and what is wrong there.
        StoreDamaged, StoreFailed, CollectionNotFound: as with any use of a collection.
    """
    _check_format(format)
    header, records = _READERS[format](file, source)
    _check_header(header, collection, source)
    return _upsert(collection, records, progress)


def import_new(
    collections: CollectionSet,
    name: str,
    file: BinaryIO,
    *,
    format: Format,  # noqa: A002
    source: str = "the file",
    progress: Progress = lambda count: None,
) -> dict[str, int]:
    """`import_records` into a collection made for it, with the file's model, metric and spaces.

    Without a readable header none is made. After a fault further on it stays, with what stands
    before the fault.

    Raises:
        As `import_records`; and CollectionExists, InvalidName: the name is taken, or cannot be.
    """
    _check_format(format)
    header, records = _READERS[format](file, source)
    try:
        collection = collections.create(
            name, spaces=header.spaces, model=header.model, metric=check_metric(header.metric)
        )
    except InvalidSettings as error:  # a metric that there is not
        raise ImportFailed(f"{source}: {error}") from error
    return _upsert(collection, records, progress)


def _check_format(format: str) -> None:  # noqa: A002
    if format not in FORMATS:
        raise FormatUnavailable(f"there is no format {format!r}; there are {', '.join(FORMATS)}")


def _exported(
    collection: Collection,
    filter: Mapping[str, Any] | None,  # noqa: A002
    progress: Progress,
) -> Iterator[ExportedRecord]:
    cursor: str | None = None
    while True:
        page = collection.scroll(cursor=cursor, limit=_PAGE, with_vectors=True, filter=filter)
        for record in page.records:
            yield ExportedRecord(record, _thumbnail(collection, record.id))
            progress(1)
        cursor = page.next_cursor
        if cursor is None:
            return


def _thumbnail(collection: Collection, record_id: str) -> bytes | None:
    try:
        return collection.thumbnail(record_id)
    except RecordNotFound:
        return None


def _check_header(header: Header, collection: Collection, source: str) -> None:
    if header.model != collection.model:
        raise ModelMismatch(
            f"{source} holds vectors of model {header.model!r}, which cannot be compared with "
            f"those of {collection.model!r} in collection {collection.name!r}"
        )
    if dict(header.spaces) != collection.spaces:
        raise InvalidVector(
            f"{source} has spaces {dict(header.spaces)}; collection {collection.name!r} has "
            f"{collection.spaces}"
        )


def _upsert(collection: Collection, records: Placed, progress: Progress) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(_OUTCOMES, 0)
    try:
        for batch in _batches(_checked(records, collection)):
            for written in collection.upsert(batch):
                counts[written.outcome] += 1
            progress(len(batch))
    except ImportFailed as fault:
        done = sum(counts.values())
        raise ImportFailed(
            f"{fault}. The {done} records before that are in collection {collection.name!r}"
        ) from fault
    return counts


def _checked(records: Placed, collection: Collection) -> Iterator[NewRecord]:
    seen = set[str]()
    for at, record in records:
        try:
            checked = check_record(record, collection.spaces, collection.metric)
        except (InvalidRecord, InvalidVector) as error:
            raise ImportFailed(f"{at}: {error}") from error
        # An export has each id once. Taking the last would write such a record twice each time.
        if record.id in seen:
            raise ImportFailed(f"{at}: the id {record.id!r} stands there a second time")
        seen.add(record.id)
        yield replace(record, vectors=checked.vectors)


def _batches(records: Iterable[NewRecord]) -> Iterator[list[NewRecord]]:
    """Lists of records; what stands before a fault comes out before the fault is raised."""
    batch = list[NewRecord]()
    try:
        for record in records:
            batch.append(record)
            if len(batch) == _BATCH:
                yield batch
                batch = []
    except ImportFailed:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
