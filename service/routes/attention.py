"""POST /v1/attention: maps of a picture's patches, as a picture or as numbers."""

import numpy as np
from fastapi import APIRouter, Request, Response
from PIL import Image

from service import heatmaps, patch_maps, uploads
from service.encoded import EncodedPicture
from service.encoder import Array, AttentionTask, ModelInfo, Task, TokensTask
from service.errors import RequestError
from service.model_schemas import AttentionAnswer, AttentionOptions, AttentionRequest
from service.png import Both
from service.routes.embeddings import as_json, npy
from service.routes.negotiation import NPY, preferred
from service.routes.openapi import PICTURE_ERRORS, binary, picture_body
from service.schemas import PICTURE_EXAMPLE
from service.services import services_of

router = APIRouter(tags=["attention"])

_DEFAULTS = AttentionOptions()
_LARGEST_DEFAULT = 1024
_JSON = "application/json"
_KINDS = {"png": "image/png", "webp": "image/webp", "json": _JSON, "npy": NPY[0]}
_OFFERED = ("image/png", "image/webp", _JSON, *NPY)
_MEANINGLESS = {
    "view=pca": ("head", "block", "point", "rollout", "threshold", "colormap"),
    "view=similarity": ("head", "block", "rollout", "threshold"),
    "rollout": ("head", "block"),
}


@router.post(
    "/v1/attention",
    summary="A picture's self-attention, and other maps of its patches",
    response_class=Response,
    responses={
        **PICTURE_ERRORS,
        200: {
            "model": AttentionAnswer,
            "description": "The map over the picture; or the numbers, as JSON or as a .npy file of "
            "float32 [maps, rows, columns].",
            "content": {kind: binary("a picture") for kind in _OFFERED[:2]}
            | {kind: binary("a .npy file") for kind in NPY},
        },
    },
    openapi_extra=picture_body(
        AttentionRequest,
        examples={
            "mean": {"image": PICTURE_EXAMPLE},
            "heads": {"image": PICTURE_EXAMPLE, "head": "all", "block": -1, "threshold": 0.6},
            "likeness": {"image": PICTURE_EXAMPLE, "view": "similarity", "point": "0.5,0.5"},
        },
        options=AttentionOptions,
    ),
)
async def attention(request: Request) -> Response:
    """One picture, seen whole and in its own aspect ratio; drawn over it, or as numbers."""
    services, options = services_of(request), uploads.read_options(request, AttentionOptions)
    if uploads.is_json(request):
        body = await uploads.read_json(request, AttentionRequest)
        options, picture = body, EncodedPicture(content=body.image, param="image")
    else:
        picture = await uploads.read_one(request)
    _check_together(options)
    info = services.models.info(options.model)
    task = _task(options, info)
    kind = _KINDS.get(options.format or "") or preferred(
        request.headers.get("accept", ""), _OFFERED
    )
    vision = await services.vision(info.name)

    def write(found: Array, seen: Image.Image) -> bytes:
        maps, names = _maps(found, options)
        if kind == _JSON:
            return _as_json(maps, names, options, task, info)
        if kind in NPY:
            return npy(maps)
        return _drawn(maps, names, seen, options, kind, vision.both)

    largest = options.size or _LARGEST_DEFAULT
    return Response(await vision.attention(picture, task, write, largest=largest), media_type=kind)


def _task(options: AttentionOptions, info: ModelInfo) -> Task:
    """What is asked of the model.

    Raises:
        RequestError: attention of a convolutional network, a head or block that is not there, or
            more pixels than may be asked for.
    """
    resolution = options.resolution
    if resolution is not None and resolution > info.max_resolution:
        raise RequestError(
            f"resolution is {resolution}; of the model {info.name!r} at most "
            f"{info.max_resolution} may be asked for",
            code="invalid_resolution",
            param="resolution",
        )
    if resolution is not None and info.patch_size is not None:
        # What the model sees; so requests that mean the same share batches and results.
        resolution = info.patch_size * max(1, round(resolution / info.patch_size))
    if options.view != "attention":
        return TokensTask(resolution=resolution)
    if not info.heads:
        raise RequestError(
            f"the model {info.name!r} ({info.architecture}) is a convolutional network, which has "
            "no attention; serve a ViT for this, or ask for view=pca or view=similarity",
            code="attention_unavailable",
        )
    if options.head.isdigit() and int(options.head) >= info.heads:
        raise RequestError(
            f"head is {options.head}; the model has {info.heads}, numbered from 0 to "
            f"{info.heads - 1}",
            code="invalid_head",
            param="head",
        )
    block = -1 if options.block is None else options.block
    if not -info.blocks <= block < info.blocks:
        raise RequestError(
            f"block is {block}; the model has {info.blocks}, numbered from 0 to {info.blocks - 1}, "
            f"or from -1 (the last) to {-info.blocks}",
            code="invalid_block",
            param="block",
        )
    return AttentionTask(
        block=None if options.rollout else block % info.blocks,
        point=options.at,
        resolution=resolution,
    )


def _check_together(options: AttentionOptions) -> None:
    attention = options.view == "attention"
    chosen = "rollout" if attention and options.rollout else f"view={options.view}"
    for name in _MEANINGLESS.get(chosen, ()):
        value = getattr(options, name)
        if value != getattr(_DEFAULTS, name):
            raise RequestError(
                f"{name} is {value!r}, which means nothing with {chosen}; leave one of them out",
                code="incompatible_options",
                param=name,
            )
    if options.view == "similarity" and options.point is None:
        raise RequestError(
            "point is missing: view=similarity compares all patches to the one at point=x,y",
            code="missing_point",
            param="point",
        )


def _maps(found: Array, options: AttentionOptions) -> tuple[Array, list[int | str]]:
    """The maps [n, rows, columns] that were asked for, and what each of them is."""
    if options.view == "pca":
        return patch_maps.principal_components(found), [0, 1, 2]
    if options.view == "similarity":
        return patch_maps.similarity(found, options.at or (0.5, 0.5)), ["similarity"]
    if options.rollout:
        return found, ["rollout"]
    if options.head == "mean":
        return found.mean(axis=0, keepdims=True, dtype=np.float32), ["mean"]
    if options.head == "max":
        return found.max(axis=0, keepdims=True), ["max"]
    if options.head == "all":
        return found, list(range(len(found)))
    return found[int(options.head)][None], [int(options.head)]


def _as_json(
    maps: Array, names: list[int | str], options: AttentionOptions, task: Task, info: ModelInfo
) -> bytes:
    return as_json(
        {
            "model": info.name,
            "view": options.view,
            "grid": maps.shape[1:],
            "block": task.block if isinstance(task, AttentionTask) else None,
            "heads": names,
            "maps": np.ascontiguousarray(maps),
        }
    )


def _drawn(
    maps: Array,
    names: list[int | str],
    picture: Image.Image,
    options: AttentionOptions,
    kind: str,
    both: Both,
) -> bytes:
    style = heatmaps.Style(
        colormap=options.colormap,
        overlay=options.overlay,
        threshold=options.threshold,
        size=options.size or max(picture.size),
        format="webp" if kind == "image/webp" else "png",
    )
    if options.view == "pca":
        return heatmaps.draw_components(maps, picture, style, both=both)
    if options.view == "similarity":
        maps = heatmaps.stretched(maps)
    labels = [str(name) for name in names] if options.head == "all" else []
    return heatmaps.draw(maps, picture, style, labels=labels, both=both)
