"""Search by picture, id or vector, and the k-NN vote."""

import json
import math
from typing import Annotated, Any, cast

import anyio.to_thread
import numpy as np
from fastapi import APIRouter, Query, Request
from numpy.typing import ArrayLike

from index.collection import Collection, Match
from service import uploads
from service.encoded import EncodedPicture
from service.encoder import Array
from service.errors import RequestError
from service.measurements import timed
from service.routes.openapi import ERRORS, CollectionName, picture_body
from service.schemas import (
    FILTER_EXAMPLE,
    PICTURE_EXAMPLE,
    ClassifyAnswer,
    ClassifyOptions,
    ClassifyRequest,
    ClassifyTerms,
    LabelProbability,
    SearchAnswer,
    SearchMatch,
    SearchOptions,
    SearchRequest,
    SearchTerms,
)
from service.services import Served
from service.vision import Vision

router = APIRouter(prefix="/v1/collections/{name}", tags=["search"], responses=ERRORS)


@router.post(
    "/search",
    summary="The nearest pictures",
    openapi_extra=picture_body(
        SearchRequest,
        examples={
            "picture": {"image": PICTURE_EXAMPLE, "k": 5},
            "id": {"id": "cat-1", "filter": FILTER_EXAMPLE, "min_score": 0.5},
        },
    ),
)
async def search(
    name: CollectionName,
    request: Request,
    services: Served,
    query: Annotated[SearchOptions, Query()],
) -> SearchAnswer:
    """By a picture, by the id of one in the collection (itself left out), or by a vector."""
    collection, vision = await services.open(name)
    options: SearchTerms = query
    exclude: list[str] = []
    if uploads.is_json(request):
        body = await uploads.read_json(request, SearchRequest)
        options, chosen = body, body.filter
        vector, exclude = await _vector_of(body, collection, vision)
    else:
        chosen = uploads.parse_filter(query.filter)
        picture = await uploads.read_one(request)
        vector = await _embed(picture, vision)

    def find() -> list[Match]:
        return collection.search(
            vector, k=options.k, filter=chosen, min_score=options.min_score, exclude=exclude
        )

    with timed("search"):
        matches = await anyio.to_thread.run_sync(find)
    return SearchAnswer(matches=to_matches(matches))


@router.post(
    "/classify",
    summary="The k-NN vote over a label",
    openapi_extra=picture_body(
        ClassifyRequest, examples={"vote": {"image": PICTURE_EXAMPLE, "label": "label", "k": 20}}
    ),
)
async def classify(
    name: CollectionName,
    request: Request,
    services: Served,
    query: Annotated[ClassifyOptions, Query()],
) -> ClassifyAnswer:
    """Each of the k nearest votes for its label with weight exp(score / temperature)."""
    collection, vision = await services.open(name)
    options: ClassifyTerms = query
    if uploads.is_json(request):
        body = await uploads.read_json(request, ClassifyRequest)
        options, chosen = body, body.filter
        picture = EncodedPicture(content=body.image, param="image")
    else:
        chosen = uploads.parse_filter(query.filter)
        picture = await uploads.read_one(request)
    label = options.label
    if label is None:
        raise RequestError(
            "label is missing: name the metadata key whose value is voted on",
            code="missing_label",
            param="label",
        )
    vector = await _embed(picture, vision)

    def find() -> list[Match]:
        return collection.search(vector, k=options.k, filter=chosen)

    with timed("search"):
        neighbours = await anyio.to_thread.run_sync(find)
    return ClassifyAnswer(
        labels=vote(neighbours, label, options.temperature),
        neighbours=to_matches(neighbours),
    )


def vote(neighbours: list[Match], label: str, temperature: float) -> list[LabelProbability]:
    """Labels by falling share of the votes (arXiv 2104.14294, section 4.1).

    Neighbours without the label do not vote. Labels may be any JSON value.
    """
    voters = [match for match in neighbours if label in match.metadata]
    best = max((match.score for match in voters), default=0.0)
    weights: dict[str, float] = {}
    for match in voters:
        key = json.dumps(match.metadata[label], sort_keys=True)
        # Relative to the best voter: a small temperature can neither overflow nor leave no weight.
        weight = math.exp((match.score - best) / temperature)
        weights[key] = weights.get(key, 0.0) + weight
    total = sum(weights.values())
    ranked = sorted(weights.items(), key=lambda item: -item[1])
    return [LabelProbability(label=json.loads(k), probability=w / total) for k, w in ranked]


def to_matches(matches: list[Match]) -> list[SearchMatch]:
    """Matches as they go over the wire."""
    return [SearchMatch(id=m.id, score=m.score, metadata=m.metadata) for m in matches]


async def _vector_of(
    body: SearchRequest, collection: Collection, vision: Vision
) -> tuple[Any, list[str]]:
    given = [name for name in ("image", "id", "vector") if getattr(body, name) is not None]
    if len(given) != 1:
        raise RequestError(
            f"give exactly one of image, id, vector; given: {', '.join(given) or 'none'}",
            code="invalid_query",
            param=given[1] if len(given) > 1 else None,
        )
    if body.image is not None:
        picture = EncodedPicture(content=body.image, param="image")
        return await _embed(picture, vision), []
    if body.id is not None:
        record_id = body.id

        def load() -> Array:
            return collection.get(record_id, with_vectors=True).vectors["cls"]

        return await anyio.to_thread.run_sync(load), [record_id]
    return _similarity(body.vector or [], vision), []


async def _embed(picture: EncodedPicture, vision: Vision) -> Array:
    return _similarity((await vision.encode("cls", [picture]))[0], vision)


def _similarity(cls: ArrayLike, vision: Vision) -> Array:
    """What the collection compares, of a CLS embedding of any length.

    What is no embedding goes on as it is: the collection says what is wrong with it.
    """
    given = np.asarray(cls, dtype=np.float64)
    largest = float(np.abs(given).max(initial=0.0))
    usable = 0.0 < largest <= float(np.finfo(np.float32).max)
    if given.shape != (vision.info.embedding_size,) or not usable:
        return cast(Array, given)
    scaled: Array = (given / largest).astype(np.float32)
    similar: Array = vision.similarity(scaled[np.newaxis])[0]
    return similar
