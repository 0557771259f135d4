"""create_app: the one place where the service is put together."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.routing import Match, Mount
from starlette.types import Scope

from index.collection_set import CollectionSet
from service.collectors import IndexCollector, ServiceCollector
from service.disconnects import CancelledOnDisconnect
from service.door import add_door
from service.errors import add_error_handlers
from service.images import quiet_decoders
from service.lifecycle import End, Gate, Lifecycle, Tell
from service.loading import find_models
from service.memory import give_back, trimmer
from service.metrics import Metrics
from service.models import Models
from service.observing import Observed
from service.routes import (
    attention,
    collections,
    copies,
    docs,
    embeddings,
    health,
    images,
    metrics,
    search,
    snapshots,
)
from service.routes.direct import Direct
from service.services import Services, spaces_of
from service.settings import Settings, load_settings
from service.tracing import open_tracing
from service.uploads import Admission, BodyLimit

DEFAULT_COLLECTION = "default"
Find = Callable[[Settings, Metrics], Models]
_WEB = Path(__file__).parent / "web"
_TRIM_EVERY_S = 5.0
_log = logging.getLogger("service")

_DESCRIPTION = """
Embeddings, self-attention maps, similarity search and copy detection with a DINO backbone.

A picture is sent as a multipart file (field `image`), as a raw `image/*` body, or in JSON as a data
URI or base64 string (or its `http(s)` URL, where the operator has switched fetching on). With a
multipart or raw picture the options stand in the query string; in JSON they are fields beside the
picture. Every error has the shape `{"error": {"message", "type", "param", "code"}}`.

A `filter` says by their metadata which pictures count, as in
`{"must": [{"key": "label", "match": {"value": "cat"}}]}`: of its clauses `must`, `should` and
`must_not` each is a list of conditions, and a condition is a `key` with `match`, `range` or
`exists`. The page docs/filters.md has all of it.
"""


def create_app(
    settings: Settings | None = None, *, find: Find | None = None, end: End | None = None
) -> FastAPI:
    """The service as an ASGI application.

    Nothing is loaded before the application starts.

    Args:
        settings: default: from the environment and `.env`.
        find: gives the models, in place of `find_models`.
        end: ends the process with an exit status. With it the application starts at once and
            loads behind its open port; without it, it is ready when it has started.

    Raises:
        KeysError: the file of keys cannot be used.
        TracingUnavailable: traces are asked for, and the extra is not installed.
    """
    settings = settings or load_settings()
    counted = Metrics()
    tracing = open_tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None
    lifecycle = Lifecycle(
        lambda tell: _start(settings, find or find_models, counted, tell), _stop, end=end
    )
    counted.registry.register(ServiceCollector(lifecycle.why_not_ready, lambda: lifecycle.services))
    counted.registry.register(IndexCollector(lambda: lifecycle.services))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await lifecycle.begin()
        trim = trimmer()
        trimming = asyncio.create_task(give_back(trim, every_s=_TRIM_EVERY_S)) if trim else None
        try:
            yield
        finally:
            if trimming is not None:
                trimming.cancel()
            await lifecycle.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="dinoscope",
        version="0.1.0",
        description=_DESCRIPTION.strip(),
        lifespan=lifespan,
        docs_url=None,  # see service/routes/docs.py
        redoc_url=None,
    )
    app.state.lifecycle, app.state.metrics = lifecycle, counted
    add_error_handlers(app)
    api = (health, metrics, embeddings, attention, collections, images, snapshots, search, copies)
    for routes in (embeddings, attention):
        app.router.routes.extend(
            Direct(route) for route in routes.router.routes if isinstance(route, APIRoute)
        )
    for routes in (*api, docs):
        app.include_router(routes.router)
    app.mount(docs.VIEWER, StaticFiles(packages=[docs.VIEWER_FILES]))
    app.router.routes.append(_Page("/", StaticFiles(directory=_WEB, html=True), name="web"))
    # From the inside outwards.
    app.add_middleware(Admission, max_requests=settings.max_requests)
    app.add_middleware(BodyLimit, max_bytes=settings.max_request_bytes)
    app.add_middleware(CancelledOnDisconnect)
    app.add_middleware(Gate, lifecycle=lifecycle)
    add_door(app, settings, web=_WEB, others=docs.LOADED)
    app.add_middleware(
        Observed, metrics=counted, deadline_s=settings.deadline_seconds, tracing=tracing
    )
    return app


class _Page(Mount):
    """The page's files, after every route: a plain mount of `/` would make each 405 a 404."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        if match is Match.NONE or scope.get("method") not in ("GET", "HEAD"):
            return Match.NONE, {}
        return Match.PARTIAL, child_scope


def _start(settings: Settings, find: Find, metrics: Metrics, tell: Tell) -> Services:
    quiet_decoders()
    tell("loading the model")
    models = find(settings, metrics)
    try:
        for info in models.infos if settings.load_models == "start" else models.infos[:1]:
            tell("warming up")
            models.vision(info.name)
        tell("opening collections")
        opened = CollectionSet(settings.data_dir)
    except BaseException:
        models.close()
        raise
    services = Services(settings=settings, models=models, collections=opened)
    try:
        _make_default(services)
    except BaseException:
        _stop(services)
        raise
    for info in models.infos:
        _log.info("serving %s (%s, fingerprint %s)", info.name, info.architecture, info.fingerprint)
    _log.info("collections are in %s", settings.data_dir)
    return services


def _make_default(services: Services) -> None:
    """Makes the default collection, anew where it is empty and of another model."""
    opened, default = services.collections, services.models.default
    if DEFAULT_COLLECTION in opened.names() and DEFAULT_COLLECTION not in opened.damaged:
        found = opened.get(DEFAULT_COLLECTION)
        if found.model != default.fingerprint and found.count() == 0:
            opened.delete(DEFAULT_COLLECTION)
    if DEFAULT_COLLECTION not in opened.names():
        opened.create(DEFAULT_COLLECTION, spaces=spaces_of(default), model=default.fingerprint)


def _stop(services: Services) -> None:
    try:
        services.models.close()
    finally:
        services.collections.close()
