"""Copy detection with the paper's descriptor: CLS and GeM of the squashed picture."""

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request

from index.collection import Match
from service import uploads
from service.encoded import EncodedPicture
from service.measurements import timed
from service.routes.openapi import ERRORS, CollectionName, picture_body
from service.schemas import (
    PICTURE_EXAMPLE,
    CopyAnswer,
    CopyMatch,
    CopyOptions,
    CopyRequest,
    CopyTerms,
)
from service.services import Served

router = APIRouter(prefix="/v1/collections/{name}", tags=["copies"], responses=ERRORS)


@router.post(
    "/copies",
    summary="Candidates for copies",
    openapi_extra=picture_body(
        CopyRequest, examples={"picture": {"image": PICTURE_EXAMPLE, "k": 5}}
    ),
)
async def copies(
    name: CollectionName, request: Request, services: Served, query: Annotated[CopyOptions, Query()]
) -> CopyAnswer:
    """Raw scores, no verdict: a threshold means nothing before the collection is calibrated."""
    collection, vision = await services.open(name)
    options: CopyTerms = query
    if uploads.is_json(request):
        body = await uploads.read_json(request, CopyRequest)
        options, chosen = body, body.filter
        picture = EncodedPicture(content=body.image, param="image")
    else:
        chosen = uploads.parse_filter(query.filter)
        picture = await uploads.read_one(request)
    vector = (await vision.encode("copy", [picture]))[0]

    def find() -> list[Match]:
        return collection.search(vector, k=options.k, space="copy", filter=chosen)

    with timed("search"):
        matches = await anyio.to_thread.run_sync(find)
    return CopyAnswer(matches=[CopyMatch(id=m.id, score=m.score) for m in matches])
