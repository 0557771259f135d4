"""POST /v1/embeddings: OpenAI's JSON with pictures for texts, or pictures as a form or raw."""

import base64
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request

from service import uploads
from service.encoder import Array
from service.errors import RequestError
from service.routes.openapi import ERRORS, picture_body
from service.schemas import Embedding, EmbeddingAnswer, EmbeddingOptions, EmbeddingRequest
from service.services import Served, spaces_of

router = APIRouter(tags=["embeddings"])


@router.post(
    "/v1/embeddings",
    summary="Pictures to vectors",
    responses=ERRORS,
    openapi_extra=picture_body(EmbeddingRequest),
)
async def embed(
    request: Request, services: Served, query: Annotated[EmbeddingOptions, Query()]
) -> EmbeddingAnswer:
    """One embedding for each picture, in order; all or none."""
    most = services.settings.max_request_images
    options, dimensions = query, None
    if uploads.is_json(request):
        body = await uploads.read_json(request, EmbeddingRequest)
        pictures = uploads.pictures_of(body.input, max_pictures=most, param="input")
        options, dimensions = body, body.dimensions
    else:
        upload = await uploads.read_upload(request, max_pictures=most)
        pictures = upload.pictures
    info = services.models.info(options.model)
    _check_dimensions(dimensions, spaces_of(info)[options.feature])
    vision = await services.vision(info.name)
    vectors = await vision.encode(options.feature, pictures)
    as_base64 = options.encoding_format == "base64"
    return EmbeddingAnswer(
        data=[
            Embedding(index=i, embedding=_encoded(vector, options.normalize, as_base64))
            for i, vector in enumerate(vectors)
        ],
        model=info.name,
    )


def _encoded(vector: Array, normalize: bool, as_base64: bool) -> list[float] | str:
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]


def _check_dimensions(asked: int | None, known: int) -> None:
    if asked not in (None, known):
        raise RequestError(
            f"dimensions is {asked}, but the model's embeddings have {known} and cannot be cut: "
            "DINO was not trained for shorter ones",
            code="invalid_dimensions",
            param="dimensions",
        )
