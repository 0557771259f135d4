"""GET /metrics: what the service counts, for Prometheus."""

from typing import cast

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

router = APIRouter()


@router.get(
    "/metrics",
    tags=["health"],
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "description": "docs/metrics.md lists them.",
        }
    },
)
def read_metrics(request: Request) -> Response:
    """In Prometheus' text format, or OpenMetrics where `Accept` asks for that."""
    registry = cast(CollectorRegistry, request.app.state.metrics.registry)
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"Content-Type": kind})
