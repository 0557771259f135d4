"""Whether the service lives and is ready, and which model it serves."""

from dataclasses import asdict

from fastapi import APIRouter, Request, Response

from service.lifecycle import Lifecycle
from service.schemas import Health, ModelCard, ModelList
from service.services import Served

router = APIRouter()


@router.get("/healthz", tags=["health"], summary="Alive?")
async def healthz() -> Health:
    """200 as long as the process answers."""
    return Health(status="ok")


@router.get(
    "/readyz",
    tags=["health"],
    summary="Ready?",
    responses={503: {"model": Health, "description": "Not ready; the reasons are listed."}},
)
async def readyz(request: Request, response: Response) -> Health:
    """200 when the model takes pictures, else 503: it loads, or failed on several batches in a row.

    Damaged collections are listed, but leave the service ready: the others work.
    """
    lifecycle: Lifecycle = request.app.state.lifecycle
    reasons = lifecycle.why_not_ready()
    if reasons:
        response.status_code = 503
        response.headers["Retry-After"] = "1"
    damaged = {} if lifecycle.services is None else lifecycle.services.collections.damaged
    return Health(
        status="unavailable" if reasons else "ok",
        reasons=[*reasons, *(str(error) for error in list(damaged.values()))],
    )


@router.get("/v1/models", tags=["models"], summary="The models that are served")
async def models(services: Served) -> ModelList:
    """OpenAI's list, with embedding, input and patch size, and the licence of the weights.

    The first is the one that serves requests which name none.
    """
    cards = []
    for info in services.models.infos:
        told = asdict(info)
        cards.append(ModelCard(id=told.pop("name"), **told))
    return ModelList(data=cards)
