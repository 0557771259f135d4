"""POST /v1/embeddings: OpenAI's JSON with pictures for texts, or pictures as a form or raw."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import anyio.to_thread
import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from service import uploads
from service.encoder import Array, ModelInfo
from service.errors import RequestError
from service.model_schemas import EmbeddingAnswer, EmbeddingOptions, EmbeddingRequest, Usage
from service.routes.negotiation import NPY, preferred
from service.routes.openapi import PICTURE_ERRORS, binary, picture_body
from service.schemas import PICTURE_EXAMPLE
from service.services import services_of

router = APIRouter(tags=["embeddings"])

_JSON = "application/json"
_NO_TOKENS = Usage().model_dump()
_QUICKLY_WRITTEN = 2**13  # numbers that the event loop may write itself


@router.post(
    "/v1/embeddings",
    summary="Pictures to vectors",
    response_model=EmbeddingAnswer,
    responses={
        **PICTURE_ERRORS,
        200: {
            "description": "JSON; or one float32 array as a .npy file, where `Accept` asks for it: "
            "[pictures, length], of patches [pictures, rows, columns, length].",
            "content": {kind: binary("a .npy file") for kind in NPY},
        },
    },
    openapi_extra=picture_body(
        EmbeddingRequest,
        examples={
            "one": {"input": PICTURE_EXAMPLE},
            "several": {"input": [PICTURE_EXAMPLE, PICTURE_EXAMPLE], "feature": "last4"},
        },
        options=EmbeddingOptions,
    ),
)
async def embed(request: Request) -> Response:
    """One embedding for each picture, in order; all or none."""
    services, options = services_of(request), uploads.read_options(request, EmbeddingOptions)
    most = services.settings.max_request_images
    if uploads.is_json(request):
        body = await uploads.read_json(request, EmbeddingRequest)
        pictures = uploads.pictures_of(body.input, max_pictures=most, param="input")
        options = body
    else:
        upload = await uploads.read_upload(request, max_pictures=most)
        pictures = upload.pictures
    info = services.models.info(options.model)
    kind = preferred(request.headers.get("accept", ""), (_JSON, *NPY))
    _check(options, info, kind)
    vision = await services.vision(info.name)
    vectors = await vision.encode(options.feature, pictures)

    def write() -> bytes:
        return _answer(vectors, options, info.name, kind)

    quick = len(vectors) * vectors[0].size <= _QUICKLY_WRITTEN
    return Response(write() if quick else await anyio.to_thread.run_sync(write), media_type=kind)


def npy(values: Array) -> bytes:
    """An array as the bytes of a .npy file, little-endian float32, without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype("<f4"), allow_pickle=False)
    return buffer.getvalue()


def as_json(answer: dict[str, Any]) -> bytes:
    """An answer with arrays of float32 in it, in one piece of memory each.

    Each number is the shortest decimal that is that float32 again; null is what is no number. An
    `Answer` of so many numbers would take many times as long to make and to write.
    """
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _answer(vectors: Sequence[Array], options: EmbeddingOptions, model: str, kind: str) -> bytes:
    if options.normalize:
        vectors = [_normalized(vector) for vector in vectors]
    if kind != _JSON:
        return npy(np.stack(vectors))
    as_base64 = options.encoding_format == "base64"
    answer: dict[str, Any] = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, as_base64)}
            for i, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": _NO_TOKENS,
    }
    if options.feature == "patches":
        answer["grid"] = vectors[0].shape[:2]
    return as_json(answer)


def _normalized(vector: Array) -> Array:
    length = np.sqrt(np.square(vector).sum(axis=-1, keepdims=True))
    normalized: Array = vector / np.maximum(length, 1e-12)
    return normalized


def _encoded(vector: Array, as_base64: bool) -> Array | str:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return np.ascontiguousarray(vector)  # as orjson wants them


def _check(options: EmbeddingOptions, info: ModelInfo, kind: str) -> None:
    """Refuses what the model does not have, and what cannot go together."""
    if options.feature not in info.features:
        raise RequestError(
            f"feature is {options.feature!r}, which the model {info.name!r} ({info.architecture}) "
            f"does not have: it is a convolutional network, without a transformer's blocks; it has "
            f"{', '.join(info.features)}",
            code="feature_unavailable",
            param="feature",
        )
    length = info.features[options.feature]
    if options.dimensions not in (None, length):
        raise RequestError(
            f"dimensions is {options.dimensions}, but feature={options.feature} of the model has "
            f"{length} and cannot be cut: DINO was not trained for shorter embeddings",
            code="invalid_dimensions",
            param="dimensions",
        )
    if kind != _JSON and options.encoding_format is not None:
        raise RequestError(
            f"encoding_format is {options.encoding_format!r}, but the header Accept asks for "
            f"{kind}, which is a .npy file; leave one of them out",
            code="incompatible_options",
            param="encoding_format",
        )
