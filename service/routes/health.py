"""Whether the service lives and is ready, and which model it serves."""

from dataclasses import asdict

from fastapi import APIRouter, Response

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
async def readyz(services: Served, response: Response) -> Health:
    """200 when the model takes pictures, else 503.

    Damaged collections are listed, but leave the service ready: the others work.
    """
    reasons = [str(error) for error in list(services.collections.damaged.values())]
    ready = all(vision.alive for vision in services.models.loaded)
    if not ready:
        reasons.append("a model's thread has ended; restart the service")
        response.status_code = 503
    return Health(status="ok" if ready else "unavailable", reasons=reasons)


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
