"""Keys, CORS, the root path and headers, on every route that there is."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.routing import iter_route_contexts
from fastapi.staticfiles import StaticFiles
from starlette.routing import BaseRoute, Mount
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from service.door import only_reads
from service.keys import add_key, remove_key
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.pictures import png

pytestmark = pytest.mark.anyio

WEB = Path(__file__).parents[2] / "service" / "web"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")
PUBLIC = {
    "/",
    "/healthz",
    "/readyz",
    "/swagger/swagger-ui-bundle.js",
    "/swagger/swagger-ui.css",
    *(f"/{path.relative_to(WEB).as_posix()}" for path in WEB.rglob("*") if path.is_file()),
}
READING = {
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/attention"),
    ("POST", "/v1/collections/{name}/search"),
    ("POST", "/v1/collections/{name}/copies"),
    ("POST", "/v1/collections/{name}/classify"),
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def status_of(app: FastAPI, method: str, path: str, *, length: bytes = b"0") -> int:
    """Of a path as it is, where a client would make it tidy; a body that is read is an error."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-length", length), (b"content-type", b"image/png")],
    }
    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def writing(keys_file: Path) -> str:
    return add_key(keys_file, "writer", may_write=True)


@pytest.fixture
def reading(keys_file: Path) -> str:
    return add_key(keys_file, "reader", may_write=False)


@pytest.fixture
def app(make_app: Callable[..., FastAPI], keys_file: Path, writing: str, reading: str) -> FastAPI:
    return make_app(keys_file=keys_file)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def every_path(routes: Sequence[BaseRoute], above: str = "") -> Iterator[str]:
    """The paths of all routes, mounted ones too, and one below each mount."""
    for route in iter_route_contexts(routes):
        path = above + (route.path or "")
        yield path or "/"
        if isinstance(route.original_route, Mount):
            yield f"{path.rstrip('/')}/below"
            yield from every_path(route.original_route.routes, path.rstrip("/"))


def filled_in(path: str) -> str:
    for name, value in (("{name}", "default"), ("{id:path}", "a/b"), ("{snapshot}", "1")):
        path = path.replace(name, value)
    assert "{" not in path, f"what is a path like {path} to be tried with?"
    return path


def add_routes_nobody_thought_of(app: FastAPI) -> None:
    inner = FastAPI()
    for to, path in ((app, "/v1/new"), (inner, "/deep/route"), (inner, "/healthz")):
        to.add_api_route(path, lambda: "there", methods=[*METHODS[:-2]])
    app.mount("/mounted", inner)
    app.mount("/files", StaticFiles(directory=WEB))
    mounts = [app.router.routes.pop() for _ in range(2)]
    app.router.routes[:0] = mounts  # before the page, which takes all


async def test_no_route_can_be_used_without_a_key(app: FastAPI) -> None:
    add_routes_nobody_thought_of(app)
    paths = {filled_in(path) for path in every_path(app.routes)}
    assert paths >= {
        "/openapi.json",
        "/docs",
        "/v1/models",
        "/v1/embeddings",
        "/v1/collections/default/snapshots/1/restore",
        "/v1/collections/default/images/a/b",
        "/swagger/below",
        "/v1/new",
        "/mounted/deep/route",
        "/mounted/healthz",
        "/files/below",
    }
    paths |= {"/metrics", "/nothing", "/healthz/", "/docs/", "/v1", "/app.js/"}
    async with client_of(app) as client:
        for path in sorted(paths | PUBLIC):
            for method in METHODS:
                if path in PUBLIC and method in ("GET", "HEAD"):
                    continue
                for headers in ({}, bearer("dinoscope_wrong")):
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code == 401, (method, path)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    if method != "HEAD":
                        error_of(answer, 401, "invalid_api_key")


async def test_probes_and_page_need_no_key(serve: Serve, keys_file: Path, writing: str) -> None:
    async with serve(keys_file=keys_file) as client:
        for path in sorted(PUBLIC):
            for method in ("GET", "HEAD"):
                answer = await client.request(method, path)
                assert answer.status_code == 200 or (method == "HEAD" and path.endswith("z")), path


async def test_a_read_only_key_changes_nothing(app: FastAPI, reading: str, writing: str) -> None:
    add_routes_nobody_thought_of(app)
    readable = {(method, filled_in(path)) for method, path in READING}
    async with client_of(app) as client:
        for path in sorted({filled_in(path) for path in every_path(app.routes)}):
            for method in METHODS:
                answer = await client.request(method, path, headers=bearer(reading))
                if method in ("GET", "HEAD") or (method, path) in readable:
                    assert answer.status_code not in (401, 403), (method, path)
                else:
                    assert answer.status_code == 403, (method, path)
                    error = error_of(answer, 403, "insufficient_permissions")
                    assert "'reader'" in error["message"]
                answer = await client.request(method, path, headers=bearer(writing))
                assert answer.status_code not in (401, 403), (method, path)


async def test_what_only_reads_is_there(app: FastAPI) -> None:
    described = app.openapi()["paths"]
    for method, path in READING:
        assert only_reads(method, path)
        assert method.lower() in described[path]


async def test_what_a_key_may_do_it_can_do(
    serve: Serve, keys_file: Path, reading: str, writing: str
) -> None:
    images = "/v1/collections/default/images"
    picture = {"image": ("a.png", png(1))}
    async with serve(keys_file=keys_file) as client:
        stored = await client.post(images, files=picture, headers=bearer(writing))
        [image] = json_of(stored)["images"]
        error_of(await client.post(images, files=picture, headers=bearer(reading)), 403)
        error_of(await client.delete(f"{images}/{image['id']}", headers=bearer(reading)), 403)
        search = "/v1/collections/default/search"
        found = json_of(await client.post(search, files=picture, headers=bearer(reading)))
        assert [match["id"] for match in found["matches"]] == [image["id"]]
        scheme = {"Authorization": f"bEARER  {reading}"}
        assert (await client.get("/v1/models", headers=scheme)).status_code == 200
        remove_key(keys_file, "reader")
        error_of(await client.get("/v1/models", headers=bearer(reading)), 401)
        assert (await client.get("/v1/models", headers=bearer(writing))).status_code == 200


async def test_other_ways_to_show_a_key_are_none(app: FastAPI, writing: str) -> None:
    async with client_of(app) as client:
        for headers in (
            [("Authorization", writing)],
            [("Authorization", f"Basic {writing}")],
            [("Authorization", "Bearer")],
            [("Authorization", "Bearer ")],
            [("Authorization", f"Bearer {writing} x")],
            [("Authorization", f"Bearer {writing}"), ("Authorization", "Bearer x")],
            [("Authorization", "Bearer \u00e9".encode("latin-1"))],
            [("X-Api-Key", writing), ("Cookie", f"key={writing}")],
        ):
            error_of(await client.get("/v1/models", headers=headers), 401, "invalid_api_key")
        error_of(await client.get("/v1/models", params={"key": writing}), 401, "invalid_api_key")


async def test_a_refused_body_is_never_read(app: FastAPI) -> None:
    # Nor is it 413: strangers learn nothing of the limits.
    assert await status_of(app, "POST", "/v1/embeddings", length=b"99999999999") == 401


def test_websockets_need_a_key_too(app: FastAPI, reading: str, writing: str) -> None:
    async def greet(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("there")
        await socket.close()

    app.add_api_websocket_route("/v1/live", greet)
    client = TestClient(app)
    for headers in ({}, bearer("dinoscope_wrong"), bearer(reading)):  # it may write, who knows
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            client.websocket_connect("/v1/live", headers=headers),
        ):
            pass
        assert caught.value.code == 1008
    with client.websocket_connect("/v1/live", headers=bearer(writing)) as socket:
        assert socket.receive_text() == "there"


async def test_no_key_is_logged_or_answered(
    app: FastAPI, writing: str, reading: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = f"{writing[:-1]}~"
    answers = []
    async with client_of(app) as client:
        for key in (writing, reading, wrong):
            for method in ("GET", "POST", "DELETE"):
                for path in ("/v1/models", "/v1/collections", "/nothing", "/v1/embeddings"):
                    answer = await client.request(method, path, headers=bearer(key))
                    answers.append(f"{answer.headers}{answer.text}")
    told = "\n".join([caplog.text, *answers])
    assert not any(key in told for key in (writing, reading, wrong))


async def test_paths_made_at_random_need_a_key(app: FastAPI) -> None:
    draw = random.Random(0)
    parts = ["healthz", "readyz", "app.js", "v1", "models", "..", ".", "", "%2e", "\0", "a", ";"]
    for _ in range(500):
        path = "/" + "/".join(draw.choices(parts, k=draw.randint(1, 5)))
        assert path in PUBLIC or await status_of(app, "GET", path) == 401, path


async def test_the_description_names_the_key_where_one_is_needed(
    app: FastAPI, make_app: Callable[..., FastAPI]
) -> None:
    schema = app.openapi()
    assert schema["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            needs = path not in PUBLIC
            assert operation.get("security") == ([{"key": []}] if needs else None)
            assert ("401" in operation["responses"]) == needs
            assert ("403" in operation["responses"]) == (
                needs and method != "get" and (method.upper(), path) not in READING
            )
    assert "security" not in str(make_app().openapi())


async def test_without_keys_nobody_is_asked(serve: Serve) -> None:
    async with serve() as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models", headers=bearer("any"))).status_code == 200


async def test_pages_of_named_origins_may_call(serve: Serve, keys_file: Path, writing: str) -> None:
    friend, stranger = "https://friend.example", "https://stranger.example"
    asks = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "x-a"}
    async with serve(cors_origins=(friend,), keys_file=keys_file) as client:
        preflight = await client.options("/v1/collections/a", headers={"Origin": friend, **asks})
        assert preflight.status_code == 200  # it can bear no key
        assert preflight.headers["access-control-allow-origin"] == friend
        assert "x-a" in preflight.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in preflight.headers
        refused = await client.options("/v1/collections/a", headers={"Origin": stranger, **asks})
        assert refused.status_code == 400
        answer = await client.get("/v1/models", headers={"Origin": friend})
        error_of(answer, 401)
        assert answer.headers["access-control-allow-origin"] == friend  # the page may read why
        answer = await client.get("/v1/models", headers={"Origin": stranger, **bearer(writing)})
        assert "access-control-allow-origin" not in answer.headers
    async with serve() as client:  # off by default
        answer = await client.get("/v1/models", headers={"Origin": friend})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("prefix", ["", "/eyes/dino"])
async def test_below_a_path_of_a_proxy(
    serve: Serve, keys_file: Path, writing: str, prefix: str
) -> None:
    """Whether the proxy takes the path away (prefix "") or not."""
    async with serve(root_path="/eyes/dino", keys_file=keys_file) as client:
        page = await client.get(f"{prefix}/")
        assert page.text == (WEB / "index.html").read_text()
        assert "content-security-policy" in page.headers
        for path in ("app.js", "docs.html", "healthz", "swagger/swagger-ui.css"):
            assert (await client.get(f"{prefix}/{path}")).status_code == 200
        error_of(await client.get(f"{prefix}/v1/models"), 401)
        client.headers = bearer(writing)
        assert (await client.get(f"{prefix}/docs")).headers["location"] == "docs.html"
        schema = json_of(await client.get(f"{prefix}/openapi.json"))
        assert schema["servers"] == [{"url": "/eyes/dino"}]
        bare = await client.get("/eyes/dino", headers={"Authorization": ""})
        assert bare.headers["location"] == "http://test/eyes/dino/"
        assert (await client.get(f"{prefix}/v1/models")).status_code == 200
        error_of(await client.get(f"{prefix}x/v1/models"), 404)


async def test_headers_that_tell_browsers_to_be_careful(serve: Serve) -> None:
    async with serve() as client:
        for path in ("/", "/app.js", "/docs.html", "/swagger/swagger-ui.css"):
            answer = await client.get(path)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["cache-control"] == "no-cache"
            again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304
            assert again.headers["cache-control"] == "no-cache"
        for path in ("/", "/v1/models", "/nothing", "/openapi.json", "/healthz"):
            answer = await client.get(path)
            assert answer.headers["x-content-type-options"] == "nosniff"
