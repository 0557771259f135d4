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
    ready = services.vision.alive
    if not ready:
        reasons.append("the model's thread has ended; restart the service")
        response.status_code = 503
    return Health(status="ok" if ready else "unavailable", reasons=reasons)


@router.get("/v1/models", tags=["models"], summary="The models that are served")
async def models(services: Served) -> ModelList:
    """OpenAI's list, with embedding, input and patch size, and the licence of the weights."""
    info = asdict(services.vision.info)
    return ModelList(data=[ModelCard(id=info.pop("name"), **info)])
