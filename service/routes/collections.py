"""Collections: made, listed, looked at, deleted."""

from dataclasses import asdict

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from index.collection import Collection
from index.errors import (
    CollectionExists,
    CollectionNotFound,
    ModelMismatch,
    StoreDamaged,
    StoreFailed,
)
from index.kinds import IndexSettings
from service import uploads
from service.collection_schemas import (
    CollectionAnswer,
    CollectionList,
    CollectionOptions,
    CollectionSummary,
    IndexAnswer,
)
from service.errors import RequestError
from service.routes.openapi import (
    ERRORS,
    CollectionName,
    json_body,
)
from service.schemas import (
    Deleted,
)
from service.services import Served, Services, spaces_of

router = APIRouter(prefix="/v1/collections", tags=["collections"], responses=ERRORS)


@router.get("", summary="Every collection")
def list_collections(services: Served) -> CollectionList:
    """Names, counts and models; damaged ones are told of by `/readyz`."""
    answers = []
    for name in services.collections.names():
        try:
            answers.append(_summary(services.collections.get(name)))
        except (CollectionNotFound, StoreDamaged, StoreFailed):
            continue  # deleted since, or damaged
    return CollectionList(collections=answers)


@router.put(
    "/{name}",
    summary="Make a collection, or choose its index",
    status_code=201,
    responses={200: {"model": CollectionAnswer, "description": "It was there already."}},
    openapi_extra=json_body(
        CollectionOptions, examples={"graph": {"index": {"kind": "hnsw", "target_recall": 0.98}}}
    ),
)
async def make_collection(
    name: CollectionName, request: Request, services: Served, response: Response
) -> CollectionAnswer:
    """201 when it was made, 200 when it was there already.

    Another index is built in the background, while the present one answers.
    """
    options = await _read_options(request)
    settings = (
        None
        if options.index is None
        else IndexSettings.from_dict(options.index.model_dump(exclude_unset=True))
    )

    info = services.models.info(options.model)

    def make() -> CollectionAnswer:
        try:
            collection = services.collections.create(
                name,
                spaces=spaces_of(info),
                model=info.fingerprint,
                settings=settings,
            )
        except CollectionExists:
            response.status_code = 200
            collection = services.collections.get(name)
            _check_same_model(collection, services, options.model)
            if settings is not None:
                collection.configure(settings)
        return collection_answer(collection)

    return await anyio.to_thread.run_sync(make)


@router.get("/{name}", summary="One collection")
def get_collection(name: CollectionName, services: Served) -> CollectionAnswer:
    """How many pictures it holds, of which model, and what stands of its index."""
    return collection_answer(services.collections.get(name))


@router.delete("/{name}", summary="Delete a collection")
def delete_collection(name: CollectionName, services: Served) -> Deleted:
    """Everything in it is gone for good."""
    services.collections.delete(name)
    return Deleted(deleted=name)


def _check_same_model(collection: Collection, services: Services, asked: str | None) -> None:
    present = services.model_of(collection)
    if asked not in (None, present.name):
        raise ModelMismatch(
            f"collection {collection.name!r} is of the model {present.name!r}, not of {asked!r}; a "
            "collection keeps its model"
        )


def collection_answer(collection: Collection) -> CollectionAnswer:
    """A collection as it goes over the wire; reads sizes on disk."""
    stats = collection.stats()
    index = IndexAnswer.model_validate({**asdict(stats), "settings": collection.settings.to_dict()})
    return CollectionAnswer(
        name=stats.name,
        count=stats.count,
        model=stats.model,
        created_at=collection.created_at,
        index=index,
    )


async def _read_options(request: Request) -> CollectionOptions:
    if not await request.body():
        return CollectionOptions()
    if not uploads.is_json(request):
        raise RequestError(
            "what a collection should be like is told as application/json, or not at all",
            code="unsupported_media_type",
            status=415,
        )
    return await uploads.read_json(request, CollectionOptions)


def _summary(collection: Collection) -> CollectionSummary:
    return CollectionSummary(
        name=collection.name,
        count=collection.count(),
        model=collection.model,
        created_at=collection.created_at,
    )
