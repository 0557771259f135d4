"""The pictures in a collection: added, listed, looked at, deleted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Query, Request, Response

from index.collection import Collection, NewRecord, Record
from index.errors import (
    InvalidFilter,
    RecordNotFound,
)
from index.records import OnDuplicate, UpsertOutcome
from service import uploads
from service.encoded import EncodedPicture
from service.encoder import Task
from service.errors import ImageError, RequestError
from service.prepared import Prepared
from service.routes.openapi import (
    ERRORS,
    CollectionName,
    ImageId,
    binary,
    picture_body,
)
from service.schemas import (
    PICTURE_EXAMPLE,
    Deleted,
    DeletedImages,
    ErrorDetail,
    FilterText,
    ImageOptions,
    ImagePage,
    ImageRecord,
    NewImages,
    PageOptions,
    Stored,
    StoredImages,
)
from service.services import Served, Services
from service.together import all_or_none
from service.vision import Vision

router = APIRouter(prefix="/v1/collections", tags=["collections"], responses=ERRORS)


@router.post(
    "/{name}/images",
    summary="Add or replace pictures",
    openapi_extra=picture_body(
        NewImages,
        examples={
            "one": {
                "images": [{"image": PICTURE_EXAMPLE, "id": "cat-1", "metadata": {"label": "cat"}}]
            }
        },
        fields={
            "id": {"type": "string", "description": "of the picture in its place; repeatable"},
            "metadata": {
                "type": "string",
                "description": "of the picture in its place, a JSON object; repeatable",
            },
        },
    ),
)
async def add_images(
    name: CollectionName,
    request: Request,
    services: Served,
    query: Annotated[ImageOptions, Query()],
) -> StoredImages:
    """Durable when the answer comes. A bad picture fails alone, unless it is the only one."""
    collection, vision = await services.open(name)
    incoming, on_duplicate = await _read_images(request, services, query)
    results = await all_or_none(_prepare(collection, vision, image) for image in incoming)
    if len(results) == 1 and isinstance(results[0], RequestError):
        raise results[0]
    new = _to_be_written([r for r in results if isinstance(r, _Ready)], on_duplicate)
    outcomes = await _store(collection, vision, new, on_duplicate)
    written = dict(zip(new, outcomes, strict=True))
    return StoredImages(
        images=[
            _failed(image.id, result)
            if isinstance(result, RequestError)
            else _stored(result, written.get(result))
            for image, result in zip(incoming, results, strict=True)
        ]
    )


@router.get(
    "/{name}/images",
    summary="The pictures of a collection, page by page",
)
def list_images(
    name: CollectionName, services: Served, query: Annotated[PageOptions, Query()]
) -> ImagePage:
    """In the order of their first insertion."""
    page = services.collections.get(name).scroll(
        cursor=query.cursor, limit=query.limit, filter=uploads.parse_filter(query.filter)
    )
    return ImagePage(images=[_record(r) for r in page.records], next_cursor=page.next_cursor)


@router.delete("/{name}/images", summary="Delete the pictures that pass a filter")
def delete_images(
    name: CollectionName, services: Served, query: Annotated[FilterText, Query()]
) -> DeletedImages:
    """All of them or none, durable when the answer comes. A filter with a condition is needed."""
    collection = services.collections.get(name)
    chosen = uploads.parse_filter(query.filter)
    if chosen is None:
        raise InvalidFilter(
            "filter: it is missing; the query parameter says which pictures are to be deleted"
        )
    return DeletedImages(deleted=collection.delete_where(chosen))


@router.get("/{name}/images/{id:path}", summary="One picture's record")
def get_image(name: CollectionName, id: ImageId, services: Served) -> ImageRecord:  # noqa: A002
    """Its metadata and the hash of its content."""
    return _record(services.collections.get(name).get(id))


@router.delete("/{name}/images/{id:path}", summary="Delete one picture")
def delete_image(name: CollectionName, id: ImageId, services: Served) -> Deleted:  # noqa: A002
    """Durable when the answer comes."""
    if not services.collections.get(name).delete([id]):
        raise RecordNotFound(f"collection {name!r} has no record {id!r}")
    return Deleted(deleted=id)


@router.get(
    "/{name}/thumbnails/{id:path}",
    summary="One picture's thumbnail",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": binary("a JPEG")}, "description": "A small JPEG."},
    },
)
def get_thumbnail(name: CollectionName, id: ImageId, services: Served) -> Response:  # noqa: A002
    """A small JPEG, made when the picture was added."""
    return Response(services.collections.get(name).thumbnail(id), media_type="image/jpeg")


@dataclass(frozen=True, kw_only=True)
class _Incoming:
    picture: EncodedPicture
    id: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Ready:
    """A picture that can be stored; `is_known`: its record is there and equal."""

    record_id: str
    metadata: dict[str, Any]
    prepared: Prepared
    is_known: bool


async def _read_images(
    request: Request, services: Services, query: ImageOptions
) -> tuple[Sequence[_Incoming], OnDuplicate]:
    most = services.settings.max_request_images
    if uploads.is_json(request):
        body = await uploads.read_json(request, NewImages)
        pictures = uploads.pictures_of(
            [image.image for image in body.images], max_pictures=most, param="images"
        )
        images = [
            _Incoming(picture=picture, id=image.id, metadata=image.metadata)
            for picture, image in zip(pictures, body.images, strict=True)
        ]
        return images, body.on_duplicate
    upload = await uploads.read_upload(request, max_pictures=most, described=True)
    ids: list[str] = upload.ids or ([query.id] if query.id is not None else [])
    texts = upload.metadata or ([query.metadata] if query.metadata is not None else [])
    for name, values in (("id", ids), ("metadata", texts)):
        if values and len(values) != len(upload.pictures):
            raise RequestError(
                f"there are {len(values)} fields {name!r} for {len(upload.pictures)} pictures; "
                "give one for each picture, in their order, or none",
                code="count_mismatch",
                param=name,
            )
    metadata = [
        uploads.parse_metadata(text, param=f"metadata[{i}]") for i, text in enumerate(texts)
    ]
    images = [
        _Incoming(
            picture=picture,
            id=ids[i] if ids else None,
            metadata=metadata[i] if metadata else {},
        )
        for i, picture in enumerate(upload.pictures)
    ]
    return images, query.on_duplicate


async def _prepare(
    collection: Collection, vision: Vision, image: _Incoming
) -> _Ready | RequestError:
    """The picture as the model takes it, or why there is none."""
    try:
        prepared = await vision.prepare(image.picture, ("cls", "copy"), keep_thumbnail=True)
    except ImageError as error:
        return error
    record_id = image.id if image.id is not None else prepared.content_hash
    known = await anyio.to_thread.run_sync(_find, collection, record_id)
    return _Ready(
        record_id=record_id,
        metadata=image.metadata,
        prepared=prepared,
        is_known=known is not None
        and known.content_hash == prepared.content_hash
        and _same_json(known.metadata, image.metadata),
    )


def _to_be_written(ready: Sequence[_Ready], on_duplicate: OnDuplicate) -> list[_Ready]:
    """All but those that are known, and that no other picture of the request may change."""
    changing = [one for one in ready if not one.is_known]
    ids = {one.record_id for one in changing}
    if on_duplicate == "update":
        hashes = {one.prepared.content_hash for one in changing}
        ids |= {one.record_id for one in ready if one.prepared.content_hash in hashes}
    return [one for one in ready if not one.is_known or one.record_id in ids]


def _same_json(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal as JSON, where true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _find(collection: Collection, record_id: str) -> Record | None:
    try:
        return collection.get(record_id)
    except RecordNotFound:
        return None


async def _store(
    collection: Collection, vision: Vision, new: Sequence[_Ready], on_duplicate: OnDuplicate
) -> list[UpsertOutcome]:
    if not new:
        return []
    tasks: tuple[Task, ...] = ("cls", "copy")
    cls, copy = await all_or_none(vision.run(task, [one.prepared for one in new]) for task in tasks)
    similar = vision.similarity(np.stack(cls))
    records = [
        NewRecord(
            id=one.record_id,
            vectors={"cls": similar[i], "copy": copy[i]},
            metadata=one.metadata,
            content_hash=one.prepared.content_hash,
            thumbnail=one.prepared.thumbnail,
        )
        for i, one in enumerate(new)
    ]

    def write() -> list[UpsertOutcome]:
        return collection.upsert(records, on_duplicate=on_duplicate)

    return await anyio.to_thread.run_sync(write)


def _stored(ready: _Ready, written: UpsertOutcome | None) -> Stored:
    if written is None:
        return Stored(id=ready.record_id, outcome="unchanged")
    return Stored(id=written.id, outcome=written.outcome, same_as=written.same_as)


def _failed(record_id: str | None, error: RequestError) -> Stored:
    detail = ErrorDetail(
        message=error.message, type="invalid_request_error", param=error.param, code=error.code
    )
    return Stored(id=record_id, outcome="failed", error=detail)


def _record(record: Record) -> ImageRecord:
    return ImageRecord(
        id=record.id,
        metadata=record.metadata,
        content_hash=record.content_hash,
        created_at=record.created_at,
        updated_at=record.updated_at,
    )
