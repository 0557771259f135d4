"""POST /v1/attention: where the CLS token looks, as a picture or as numbers."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from service import uploads
from service.encoder import Array, ModelInfo
from service.errors import RequestError
from service.heatmaps import Style
from service.routes.openapi import ERRORS, picture_body
from service.schemas import AttentionAnswer, AttentionOptions, AttentionRequest
from service.services import Served
from service.vision import EncodedPicture

router = APIRouter(tags=["attention"])

_LARGEST_DEFAULT = 1024
_PNG: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "description": "A PNG; with `Accept: application/json` the raw maps.",
        "model": AttentionAnswer,
    }
}


@router.post(
    "/v1/attention",
    summary="A picture's self-attention",
    response_class=Response,
    responses={**ERRORS, **_PNG},
    openapi_extra=picture_body(AttentionRequest),
)
async def attention(
    request: Request, services: Served, query: Annotated[AttentionOptions, Query()]
) -> Response:
    """The CLS row of the last block's attention, over the picture in its own aspect ratio."""
    options = query
    if uploads.is_json(request):
        body = await uploads.read_json(request, AttentionRequest)
        options, picture = body, EncodedPicture(content=body.image, param="image")
    else:
        picture = await uploads.read_one(request)
    info = services.models.info(options.model)
    _check_attention(info)
    _check_head(options.head, info.heads)
    vision = await services.vision(info.name)
    maps, decoded = await vision.attention(picture, largest=options.size or _LARGEST_DEFAULT)
    chosen, names = _choose(maps, options.head)
    if "application/json" in request.headers.get("accept", ""):
        answer = AttentionAnswer(
            model=info.name,
            grid=(maps.shape[1], maps.shape[2]),
            heads=names,
            maps=chosen.tolist(),
        )
        return Response(answer.model_dump_json(), media_type="application/json")
    style = Style(
        colormap=options.colormap,
        overlay=options.overlay,
        threshold=options.threshold,
        size=options.size or max(decoded.size),
    )
    return Response(await vision.render(chosen, decoded, style), media_type="image/png")


def _choose(maps: Array, head: str) -> tuple[Array, list[int | str]]:
    if head == "mean":
        return maps.mean(axis=0, keepdims=True, dtype=np.float32), ["mean"]
    if head == "all":
        return maps, list(range(len(maps)))
    return maps[int(head)][None], [int(head)]


def _check_attention(info: ModelInfo) -> None:
    if "attention" not in info.tasks:
        raise RequestError(
            f"the model {info.name!r} ({info.architecture}) is a convolutional network, which has "
            "no attention; serve a ViT for this",
            code="attention_unavailable",
        )


def _check_head(head: str, heads: int) -> None:
    if head.isdigit() and int(head) >= heads:
        raise RequestError(
            f"head is {head}; the model has {heads}, numbered from 0 to {heads - 1}",
            code="invalid_head",
            param="head",
        )
