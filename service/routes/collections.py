"""Collections and the pictures in them."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Query, Request, Response

from index.collection import Collection, NewRecord, Record
from index.errors import CollectionExists, CollectionNotFound, RecordNotFound, StoreDamaged
from service import uploads
from service.encoder import Task
from service.errors import ImageError, RequestError
from service.routes.openapi import ERRORS, picture_body
from service.schemas import (
    CollectionAnswer,
    CollectionList,
    Deleted,
    ErrorDetail,
    ImageOptions,
    ImagePage,
    ImageRecord,
    NewImages,
    PageOptions,
    Stored,
    StoredImages,
)
from service.services import Served, Services
from service.vision import EncodedPicture, Prepared, all_or_none

router = APIRouter(prefix="/v1/collections", tags=["collections"], responses=ERRORS)


@router.get("", summary="Every collection")
def list_collections(services: Served) -> CollectionList:
    """Names, counts and models; damaged ones are told of by `/readyz`."""
    answers = []
    for name in services.collections.names():
        try:
            answers.append(_answer(services.collections.get(name)))
        except (CollectionNotFound, StoreDamaged):
            continue  # deleted since, or damaged
    return CollectionList(collections=answers)


@router.put("/{name}", summary="Make a collection", status_code=201)
def make_collection(name: str, services: Served, response: Response) -> CollectionAnswer:
    """201 when it was made, 200 when it was there already."""
    try:
        collection = services.collections.create(
            name, spaces=services.spaces, model=services.vision.info.fingerprint
        )
    except CollectionExists:
        response.status_code = 200
        collection = services.collection(name)
    return _answer(collection)


@router.get("/{name}", summary="One collection")
def get_collection(name: str, services: Served) -> CollectionAnswer:
    """How many pictures it holds, and of which model."""
    return _answer(services.collections.get(name))


@router.delete("/{name}", summary="Delete a collection")
def delete_collection(name: str, services: Served) -> Deleted:
    """Everything in it is gone for good."""
    services.collections.delete(name)
    return Deleted(deleted=name)


@router.post(
    "/{name}/images",
    summary="Add or replace pictures",
    openapi_extra=picture_body(
        NewImages, fields={"id": {"type": "string"}, "metadata": {"type": "string"}}
    ),
)
async def add_images(
    name: str, request: Request, services: Served, query: Annotated[ImageOptions, Query()]
) -> StoredImages:
    """Durable when the answer comes. A bad picture fails alone, unless it is the only one."""
    collection = services.collection(name)
    incoming = await _read_images(request, services, query)
    results = await asyncio.gather(*(_prepare(collection, services, image) for image in incoming))
    if len(results) == 1 and isinstance(results[0], RequestError):
        raise results[0]
    new = [result for result in results if isinstance(result, _New)]
    outcomes = iter(await _store(collection, services, new))
    return StoredImages(
        images=[
            Stored(id=result.record_id, outcome=next(outcomes))
            if isinstance(result, _New)
            else _failed(image.id, result)
            if isinstance(result, RequestError)
            else Stored(id=result.id, outcome="unchanged")
            for image, result in zip(incoming, results, strict=True)
        ]
    )


@router.get("/{name}/images", summary="The pictures of a collection, page by page")
def list_images(name: str, services: Served, query: Annotated[PageOptions, Query()]) -> ImagePage:
    """In the order of their first insertion."""
    page = services.collections.get(name).scroll(cursor=query.cursor, limit=query.limit)
    return ImagePage(images=[_record(r) for r in page.records], next_cursor=page.next_cursor)


@router.get("/{name}/images/{id:path}", summary="One picture's record")
def get_image(name: str, id: str, services: Served) -> ImageRecord:  # noqa: A002
    """Its metadata and the hash of its content."""
    return _record(services.collections.get(name).get(id))


@router.delete("/{name}/images/{id:path}", summary="Delete one picture")
def delete_image(name: str, id: str, services: Served) -> Deleted:  # noqa: A002
    """Durable when the answer comes."""
    if not services.collections.get(name).delete([id]):
        raise RecordNotFound(f"collection {name!r} has no record {id!r}")
    return Deleted(deleted=id)


@router.get(
    "/{name}/thumbnails/{id:path}",
    summary="One picture's thumbnail",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}},
)
def get_thumbnail(name: str, id: str, services: Served) -> Response:  # noqa: A002
    """A small JPEG, made when the picture was added."""
    return Response(services.collections.get(name).thumbnail(id), media_type="image/jpeg")


@dataclass(frozen=True, kw_only=True)
class _Incoming:
    picture: EncodedPicture
    id: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _New:
    record_id: str
    metadata: dict[str, Any]
    prepared: Prepared


async def _read_images(
    request: Request, services: Services, query: ImageOptions
) -> Sequence[_Incoming]:
    most = services.settings.max_request_images
    if uploads.is_json(request):
        body = await uploads.read_json(request, NewImages)
        pictures = uploads.pictures_of(
            [image.image for image in body.images], max_pictures=most, param="images"
        )
        return [
            _Incoming(picture=picture, id=image.id, metadata=image.metadata)
            for picture, image in zip(pictures, body.images, strict=True)
        ]
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
    return [
        _Incoming(
            picture=picture,
            id=ids[i] if ids else None,
            metadata=metadata[i] if metadata else {},
        )
        for i, picture in enumerate(upload.pictures)
    ]


async def _prepare(
    collection: Collection, services: Services, image: _Incoming
) -> _New | Record | RequestError:
    """What is to be written; or the record that is there already; or why there is neither."""
    try:
        prepared = await services.vision.prepare(
            image.picture, ("cls", "copy"), keep_thumbnail=True
        )
    except ImageError as error:
        return error
    record_id = image.id if image.id is not None else prepared.content_hash
    known = await anyio.to_thread.run_sync(_find, collection, record_id)
    if (
        known is not None
        and known.content_hash == prepared.content_hash
        and _same_json(known.metadata, image.metadata)
    ):
        return known
    return _New(record_id=record_id, metadata=image.metadata, prepared=prepared)


def _same_json(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal as JSON, where true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _find(collection: Collection, record_id: str) -> Record | None:
    try:
        return collection.get(record_id)
    except RecordNotFound:
        return None


async def _store(collection: Collection, services: Services, new: Sequence[_New]) -> list[Any]:
    if not new:
        return []
    vision = services.vision
    tasks: tuple[Task, ...] = ("cls", "copy")
    cls, copy = await all_or_none(
        vision.run(task, [one.prepared.inputs[task] for one in new]) for task in tasks
    )
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
    written = await anyio.to_thread.run_sync(collection.upsert, records)
    return [outcome.outcome for outcome in written]


def _failed(record_id: str | None, error: RequestError) -> Stored:
    detail = ErrorDetail(
        message=error.message, type="invalid_request_error", param=error.param, code=error.code
    )
    return Stored(id=record_id, outcome="failed", error=detail)


def _answer(collection: Collection) -> CollectionAnswer:
    return CollectionAnswer(
        name=collection.name,
        count=collection.count(),
        model=collection.model,
        created_at=collection.created_at,
    )


def _record(record: Record) -> ImageRecord:
    return ImageRecord(
        id=record.id,
        metadata=record.metadata,
        content_hash=record.content_hash,
        created_at=record.created_at,
        updated_at=record.updated_at,
    )
