"""Every error has the one shape, on every route."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder, created
from tests.service.pictures import as_base64, data_uri, png

pytestmark = pytest.mark.anyio


@pytest.fixture
def encoder(shared_encoder: FakeEncoder) -> FakeEncoder:
    shared_encoder.calls.clear()
    return shared_encoder


@pytest.fixture
def client(shared_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return shared_client


def filled_in(path: str) -> str:
    return path.replace("{name}", "default").replace("{id}", "a").replace("{snapshot}", "a")


API = created(Settings(_env_file=None), FakeEncoder()).openapi()
ROUTES = [(path, method.upper()) for path, item in API["paths"].items() for method in item]
BODIES = [filled_in(path) for path, item in API["paths"].items() if "multipart" in str(item)]


def test_the_routes_are_those_of_the_contract() -> None:
    assert set(ROUTES) >= {
        ("/healthz", "GET"),
        ("/readyz", "GET"),
        ("/v1/models", "GET"),
        ("/v1/embeddings", "POST"),
        ("/v1/attention", "POST"),
        ("/v1/collections", "GET"),
        ("/v1/collections/{name}", "PUT"),
        ("/v1/collections/{name}", "GET"),
        ("/v1/collections/{name}", "DELETE"),
        ("/v1/collections/{name}/images", "POST"),
        ("/v1/collections/{name}/images", "GET"),
        ("/v1/collections/{name}/images", "DELETE"),
        ("/v1/collections/{name}/images/{id}", "GET"),
        ("/v1/collections/{name}/images/{id}", "DELETE"),
        ("/v1/collections/{name}/search", "POST"),
        ("/v1/collections/{name}/copies", "POST"),
        ("/v1/collections/{name}/classify", "POST"),
        ("/v1/collections/{name}/snapshots", "POST"),
        ("/v1/collections/{name}/snapshots", "GET"),
        ("/v1/collections/{name}/snapshots/{snapshot}", "GET"),
        ("/v1/collections/{name}/snapshots/{snapshot}", "DELETE"),
        ("/v1/collections/{name}/snapshots/{snapshot}/restore", "POST"),
    }
    assert len(BODIES) == 6


def test_every_route_of_collections_describes_its_errors() -> None:
    described = [
        operation["responses"]
        for path, item in API["paths"].items()
        if path.startswith("/v1/collections")
        for operation in item.values()
    ]
    assert len(described) == 18
    for responses in described:
        for status in ("400", "404", "409", "413", "415", "422", "429", "503", "507"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH"])
async def test_unknown_paths(client: httpx.AsyncClient, method: str) -> None:
    for path in ("/v1/nothing", "/v2/embeddings", "/nothing.html", "/v1/collections/a/nothing"):
        error = error_of(await client.request(method, path), 404, "not_found")
        assert error["type"] == "not_found_error"
        assert path in error["message"]


async def test_wrong_methods(client: httpx.AsyncClient) -> None:
    for path, item in API["paths"].items():
        allowed = {method.upper() for method in item}
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - allowed:
            response = await client.request(method, path)
            error_of(response, 405, "method_not_allowed")
            assert set(response.headers["allow"].split(", ")) - {"HEAD"} == allowed


async def test_the_page_is_served(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert (await client.head("/")).status_code == 200
    assert (await client.get("/openapi.json")).json() == API


async def send(
    client: httpx.AsyncClient, path: str, content: bytes, kind: str | None
) -> httpx.Response:
    headers = {"Content-Type": kind} if kind else {}
    return await client.post(path, content=content, headers=headers)


async def test_bodies_that_are_nothing(client: httpx.AsyncClient) -> None:
    for path in BODIES:
        for text in (b"", b"{", b"\xff\xfe", b"nonsense", b"[" * 100_000, b"9" * 5000):
            error_of(await send(client, path, text, "application/json"), 400, "invalid_json")
        for text in (b"null", b"5", b'"text"', b"[]", b"[{}]", b"true", b"NaN"):
            error_of(await send(client, path, text, "application/json"), 422, "invalid_parameter")
        for kind in (
            None,
            "text/plain",
            "application/xml",
            "application/x-www-form-urlencoded",
            "x",
        ):
            error_of(await send(client, path, b"a=b", kind), 415, "unsupported_media_type")
        error_of(await send(client, path, b"", None), 415, "unsupported_media_type")
        for kind in ("image/png", "application/octet-stream"):
            error_of(await send(client, path, b"", kind), 400)
        for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
            for content in (b"", b"nonsense", b"--x\r\n", b"--x--\r\n"):
                error_of(await send(client, path, content, kind), 400)


async def test_surprising_text(client: httpx.AsyncClient) -> None:
    for path in BODIES:
        half = '"\\ud800"'  # half of a surrogate pair: JSON allows it, UTF-8 cannot say it
        for text in (
            f'{{{half}: 1, "image": "x"}}',
            f'{{"image": {half}, "input": {half}, "images": [{{"image": {half}}}]}}',
            f'{{"image": "{as_base64(png(1))}", "label": {half}, "id": {half}}}',
            f'{{"images": [{{"image": "{as_base64(png(1))}", "id": {half}}}]}}',
            f'{{"images": [{{"image": "{as_base64(png(1))}", "metadata": {{"a": {half}}}}}]}}',
            f'{{"images": [{{"image": "{as_base64(png(1))}", "metadata": {{{half}: 1}}}}]}}',
        ):
            response = await send(client, path, text.encode(), "application/json")
            error_of(response, response.status_code)
            assert response.status_code in (400, 422)


async def test_unknown_options(client: httpx.AsyncClient) -> None:
    for path in BODIES:
        response = await client.post(
            path,
            params={"colour": "red"},
            content=png(1),
            headers={"Content-Type": "image/png"},
        )
        assert error_of(response, 422, "invalid_parameter")["param"] == "colour"
        response = await client.post(
            path, files={"image": ("a.png", png(1))}, data={"colour": "red"}
        )
        assert error_of(response, 400, "unknown_field")["param"] == "colour"
        picture = data_uri(png(1))
        body = {"image": picture, "input": picture, "images": [{"image": picture}]}
        response = await client.post(path, json={**body, "colour": "red"})
        error_of(response, 422, "invalid_parameter")


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    "kind", ["image/png", "application/json", "multipart/form-data; boundary=x"]
)
async def test_a_body_over_the_limit(serve: Serve, told: bool, kind: str) -> None:
    read: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        yield start if kind.startswith("multipart") else b'{"a": "'
        for _ in range(100):
            read.append(1000)
            yield b"x" * 1000

    async with serve(max_request_bytes=10_000) as client:
        for path in ("/v1/embeddings", "/v1/collections/default/images"):
            read.clear()
            headers = {"Content-Type": kind}
            content: Any = b"x" * 10_001 if told else body()
            response = await client.post(path, content=content, headers=headers)
            assert ("content-length" in response.request.headers) is told
            error = error_of(response, 413, "request_too_large")
            assert "10000" in error["message"]
            assert len(read) <= 12  # it did not wait for the rest
        response = await client.post(
            "/v1/embeddings", content=b"x" * 10_000, headers={"Content-Type": "image/png"}
        )
        error_of(response, 415, "unsupported_image")


async def test_a_lying_content_length_does_not_help(serve: Serve) -> None:
    async with serve(max_request_bytes=1000) as client:
        for told in ("5", "-5", "five"):
            response = await client.post(
                "/v1/embeddings",
                content=b"x" * 1001,
                headers={"Content-Type": "image/png", "Content-Length": told},
            )
            error_of(response, 413, "request_too_large")


async def test_too_large_pictures(serve: Serve) -> None:
    content = png(1, (100, 100))
    async with serve(max_image_bytes=len(content) - 1) as client:
        for request, param in (
            ({"files": {"image": ("a.png", content)}}, "image[0]"),
            ({"content": content, "headers": {"Content-Type": "image/png"}}, "body"),
            ({"json": {"input": data_uri(content)}}, "input[0]"),
        ):
            response = await client.post("/v1/embeddings", **request)
            assert error_of(response, 413, "image_too_large")["param"] == param
    async with serve(max_image_bytes=len(content), max_image_pixels=9999) as client:
        response = await client.post("/v1/embeddings", json={"input": data_uri(content)})
        assert "100 x 100" in error_of(response, 413, "image_too_large")["message"]
    async with serve(max_image_bytes=len(content), max_image_pixels=10_000) as client:
        json_of(await client.post("/v1/embeddings", json={"input": data_uri(content)}))


async def test_a_picture_too_large_fails_alone_in_an_upload(serve: Serve) -> None:
    large, small = png(1, (200, 200)), png(2)
    async with serve(max_image_bytes=len(large) - 1) as client:
        files = [("image", ("a", small)), ("image", ("b", large))]
        answer = json_of(await client.post("/v1/collections/default/images", files=files))
        assert [one["outcome"] for one in answer["images"]] == ["created", "failed"]
        assert answer["images"][1]["error"]["code"] == "image_too_large"
        body = {"images": [{"image": data_uri(large)}, {"image": data_uri(small), "id": "b"}]}
        answer = json_of(await client.post("/v1/collections/default/images", json=body))
        assert [one["outcome"] for one in answer["images"]] == ["failed", "created"]


async def test_the_services_own_errors_are_not_told(
    serve: Serve, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(raise_errors=False) as client:

        def explode(*_: object) -> Any:
            raise KeyError("a secret")

        monkeypatch.setattr(encoder, "prepare", explode)
        response = await client.post("/v1/embeddings", json={"input": data_uri(png(1))})
        assert "secret" not in response.text
        assert error_of(response, 500, "internal_error")["type"] == "server_error"
        assert json_of(await client.get("/healthz"))["status"] == "ok"


async def test_a_failing_model_is_a_503_and_the_next_request_works(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    encoder.failure = RuntimeError("a secret of the device")
    body = {"input": data_uri(png(1))}
    response = await client.post("/v1/embeddings", json=body)
    assert "secret" not in response.text
    error_of(response, 503, "model_failed")
    encoder.failure = None
    json_of(await client.post("/v1/embeddings", json=body))
    assert json_of(await client.get("/readyz"))["status"] == "ok"


def schemas_of(schema: dict[str, Any], components: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema, and those that it may also be."""
    if "$ref" in schema:
        return schemas_of(components[schema["$ref"].rsplit("/", 1)[1]], components)
    inner = [s for key in ("anyOf", "oneOf", "allOf") for s in schema.get(key, [])]
    return [schema, *(found for s in inner for found in schemas_of(s, components))]


def numbers_in_bodies() -> list[tuple[str, str, str]]:
    """Path, method and field of each number that a JSON body may bring."""
    components = API["components"]["schemas"]
    return [
        (path, method.upper(), name)
        for path, item in API["paths"].items()
        for method, operation in item.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
        for body in schemas_of(
            operation["requestBody"]["content"]["application/json"]["schema"], components
        )
        for name, field in body.get("properties", {}).items()
        if {s.get("type") for s in schemas_of(field, components)} & {"integer", "number"}
    ]


@pytest.mark.parametrize(("path", "method", "field"), numbers_in_bodies())
async def test_true_is_no_number(
    client: httpx.AsyncClient, path: str, method: str, field: str
) -> None:
    picture = "input" if "embeddings" in path else "image"
    content = {picture: data_uri(png(seed=1)), field: True}
    answer = await client.request(method, filled_in(path), json=content)
    assert error_of(answer, 422, "invalid_parameter")["param"] == field
    assert "valid integer" in answer.text or "valid number" in answer.text


async def test_true_is_no_number_of_a_vector(client: httpx.AsyncClient) -> None:
    vector: list[Any] = [0.5] * 191 + [True]
    answer = await client.post("/v1/collections/default/search", json={"vector": vector})
    assert error_of(answer, 422, "invalid_parameter")["param"] == "vector"


def test_numbers_are_found_in_bodies() -> None:
    found = {(path, field) for path, _, field in numbers_in_bodies()}
    assert {
        ("/v1/embeddings", "dimensions"),
        ("/v1/attention", "threshold"),
        ("/v1/collections/{name}/search", "k"),
    } <= found
