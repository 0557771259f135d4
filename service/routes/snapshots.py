"""Copies of whole collections: made, listed, downloaded, restored, deleted."""

import re
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from index.errors import SnapshotNotFound
from index.snapshots import Snapshot
from service.collection_schemas import CollectionAnswer, SnapshotAnswer, SnapshotList
from service.errors import RequestError
from service.routes.collections import collection_answer
from service.routes.openapi import ERRORS, CollectionName, SnapshotName, binary
from service.schemas import Deleted, ErrorAnswer
from service.services import Served

_SQLITE = "application/vnd.sqlite3"
_PART = r"(?:\d{1,18}-\d{0,18}|-\d{1,18})"
_RANGES = re.compile(rf"bytes *= *{_PART}(?: *, *{_PART})*", re.ASCII | re.IGNORECASE)

router = APIRouter(prefix="/v1/collections/{name}/snapshots", tags=["snapshots"], responses=ERRORS)


@router.post("", summary="Make a snapshot", status_code=201)
def make_snapshot(name: CollectionName, services: Served) -> SnapshotAnswer:
    """A copy of the collection as it is now, on disk when the answer comes.

    Searches and uploads go on meanwhile.
    """
    return _answer(services.collections.snapshot(name))


@router.get("", summary="A collection's snapshots")
def list_snapshots(name: CollectionName, services: Served) -> SnapshotList:
    """Oldest first; those of a collection that is damaged, or was deleted, too."""
    found = services.collections.snapshots(name)
    if not found and name not in services.collections.names():
        services.collections.get(name)  # says that there is none
    return SnapshotList(snapshots=[_answer(snapshot) for snapshot in found])


@router.get(
    "/{snapshot}",
    summary="Download a snapshot",
    response_class=FileResponse,
    responses={
        200: {"content": {_SQLITE: binary("a database")}, "description": "A SQLite database."},
        206: {
            "content": {_SQLITE: binary("a part of it")},
            "description": "The part of it that `Range` asks for.",
        },
        416: {
            "model": ErrorAnswer,
            "description": "`Range` asks for what lies behind its end.",
        },
    },
)
def download_snapshot(
    name: CollectionName,
    snapshot: SnapshotName,
    services: Served,
    range: Annotated[  # noqa: A002
        str | None, Header(description="the bytes wanted", examples=["bytes=1048576-"])
    ] = None,
    if_range: Annotated[
        str | None, Header(description="an `ETag`: of another file `Range` counts for nothing")
    ] = None,
) -> FileResponse:
    """Its file; a part of it where the header `Range` asks for one."""
    path = services.collections.snapshot_path(name, snapshot)
    try:
        status = path.stat()
    except FileNotFoundError as error:  # deleted meanwhile, or lost
        raise SnapshotNotFound(
            f"the file of snapshot {snapshot!r} of collection {name!r} has gone"
        ) from error
    response = FileResponse(
        path, media_type=_SQLITE, filename=f"{name}-{path.name}", stat_result=status
    )
    is_same = if_range in (None, response.headers["etag"], response.headers["last-modified"])
    if range is not None and is_same:
        _check_range(range, status.st_size)
    return response


@router.post("/{snapshot}/restore", summary="Put a collection back to a snapshot")
def restore_snapshot(
    name: CollectionName, snapshot: SnapshotName, services: Served
) -> CollectionAnswer:
    """All or nothing; what was stored since the snapshot is gone.

    The collection may be damaged or deleted. Requests for it that come meanwhile may be answered
    with 404.
    """
    return collection_answer(services.collections.restore(name, snapshot))


@router.delete("/{snapshot}", summary="Delete a snapshot")
def delete_snapshot(name: CollectionName, snapshot: SnapshotName, services: Served) -> Deleted:
    """For good; the collection stays as it is."""
    services.collections.delete_snapshot(name, snapshot)
    return Deleted(deleted=snapshot)


def _check_range(header: str, size: int) -> None:
    """Refuse, in the shape of every error, what `FileResponse` would refuse as plain text."""
    ranges = re.findall(r"(\d*)-(\d*)", header) if _RANGES.fullmatch(header) else []
    if not ranges or any(first and last and int(first) > int(last) for first, last in ranges):
        raise RequestError(
            f"Range: {header!r} is not of the form 'bytes=FIRST-LAST', 'bytes=FIRST-' or "
            "'bytes=-COUNT', of which several may stand with commas between",
            code="invalid_range",
            param="Range",
        )
    if any(int(first) >= size if first else int(last) == 0 for first, last in ranges):
        raise HTTPException(
            416,
            f"Range: {header!r} asks for bytes that are not there; the file has {size}",
            headers={"Content-Range": f"bytes */{size}"},
        )


def _answer(snapshot: Snapshot) -> SnapshotAnswer:
    return SnapshotAnswer(**asdict(snapshot))
