from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from service.routes.direct import Direct
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.pictures import png

pytestmark = pytest.mark.anyio
PATHS = ("/v1/embeddings", "/v1/attention")


async def handler() -> None: ...


async def post(client: httpx.AsyncClient, path: str) -> httpx.Response:
    return await client.post(path, files={"image": ("a.png", png(1))})


def test_a_path_with_parameters_is_left_to_the_framework() -> None:
    with pytest.raises(ValueError, match="has parameters"):
        Direct(APIRoute("/a/{name}", handler))


@pytest.mark.parametrize("path", PATHS)
async def test_they_answer_and_other_methods_are_refused(
    client: httpx.AsyncClient, path: str
) -> None:
    assert (await post(client, path)).status_code == 200
    for method in ("GET", "PUT", "DELETE"):
        response = await client.request(method, path)
        error_of(response, 405)
        assert response.headers["allow"] == "POST"
    error_of(await post(client, f"{path}/x"), 404)
    described = json_of(await client.get("/openapi.json"))["paths"]
    assert list(described[path]) == ["post"]


async def test_no_other_route_is_asked_for_them(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    app.router.routes[:] = [route for route in app.router.routes if isinstance(route, Direct)]
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for path in PATHS:
            assert (await post(client, path)).status_code == 200
        error_of(await client.get("/v1/models"), 404)


async def test_below_a_root_path_and_in_the_metrics(serve: Serve) -> None:
    async with serve(root_path="/dino") as client:
        for above in ("", "/dino"):
            assert (await post(client, f"{above}/v1/embeddings")).status_code == 200
        text = (await client.get("/metrics")).text
    line = 'dinoscope_http_requests_total{method="POST",route="/v1/embeddings",status="200"} 2.0'
    assert line in text
