"""Exports made, read and compared, for the tests of every format."""

import io
import json

from index.collection import Collection
from index.errors import RecordNotFound
from index.transfer import Format, export_records, import_records
from tests.index.helpers import MODEL, SPACES, vectors

NO_SPACES = {"format": "dinoscope-collection", "version": 1, "model": MODEL, "metric": "cosine"}
HEADER = {**NO_SPACES, "spaces": SPACES}


def exported(collection: Collection, format: Format) -> bytes:  # noqa: A002
    file = io.BytesIO()
    assert export_records(collection, file, format=format) == collection.count()
    return file.getvalue()


def imported(collection: Collection, content: bytes, format: Format) -> dict[str, int]:  # noqa: A002
    return import_records(collection, io.BytesIO(content), format=format, source="f")


def contents(collection: Collection) -> list[tuple[object, ...]]:
    """All that an export keeps, in order; vectors as their bytes."""
    found = []
    for shown in collection.scroll(limit=1_000_000).records:
        each = collection.get(shown.id, with_vectors=True)
        try:
            thumbnail = collection.thumbnail(each.id)
        except RecordNotFound:
            thumbnail = None
        stored = {space: vector.tobytes() for space, vector in each.vectors.items()}
        # As JSON, because 1 == 1.0 == True and 0.0 == -0.0.
        metadata = json.dumps(each.metadata, sort_keys=True)
        found.append((each.id, metadata, each.content_hash, stored, thumbnail))
    return found


def line(id: str = "a", **fields: object) -> dict[str, object]:  # noqa: A002
    given = {space: vector.tolist() for space, vector in vectors(1).items()}
    return {"id": id, "vectors": given, **fields}


def text(*lines: object) -> bytes:
    return b"".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines
    )
