"""create_app: the one place where the service is put together."""

import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio.to_thread
import torch
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.routing import Match, Mount
from starlette.types import Scope

from backbone.pretrained import NamedModel, load_model
from index.collection_set import CollectionSet
from service.encoder import Encoder, ModelInfo, TorchEncoder, check_device, model_info
from service.errors import add_error_handlers
from service.images import Limits, quiet_decoders
from service.models import Model, Models
from service.routes import attention, collections, copies, embeddings, health, search, snapshots
from service.services import Services, spaces_of
from service.settings import Settings
from service.uploads import Admission, BodyLimit
from service.vision import Vision

DEFAULT_COLLECTION = "default"
_WEB = Path(__file__).parent / "web"
_log = logging.getLogger("service")

_DESCRIPTION = """
Embeddings, self-attention maps, similarity search and copy detection with a DINO backbone.

A picture is sent as a multipart file (field `image`), as a raw `image/*` body, or in JSON as a data
URI or base64 string. With a multipart or raw picture the options stand in the query string; in JSON
they are fields beside the picture. Every error has the shape
`{"error": {"message", "type", "param", "code"}}`.

A `filter` says by their metadata which pictures count, as in
`{"must": [{"key": "label", "match": {"value": "cat"}}]}`: of its clauses `must`, `should` and
`must_not` each is a list of conditions, and a condition is a `key` with `match`, `range` or
`exists`. The page docs/filters.md has all of it.
"""


def create_app(settings: Settings | None = None, *, models: Models | None = None) -> FastAPI:
    """The service as an ASGI application.

    Nothing is loaded before the application starts.

    Args:
        settings: default: from the environment and `.env`.
        models: what is served, in place of `find_models(settings)`.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = await anyio.to_thread.run_sync(_start, settings, models)
        app.state.services = services
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(_stop, services)

    app = FastAPI(
        title="dinoscope", version="0.1.0", description=_DESCRIPTION.strip(), lifespan=lifespan
    )
    app.add_middleware(Admission, max_requests=settings.max_requests)
    app.add_middleware(BodyLimit, max_bytes=settings.max_request_bytes)
    add_error_handlers(app)
    for routes in (health, embeddings, attention, collections, snapshots, search, copies):
        app.include_router(routes.router)
    app.router.routes.append(_Page("/", StaticFiles(directory=_WEB, html=True), name="web"))
    return app


def find_models(settings: Settings) -> Models:
    """The models that the settings name: each file is looked into, and no network is built yet.

    Raises:
        ArtifactError: there is no such model, or its file cannot be used.
        ValueError: the device is not there, or two models have one name.
    """
    check_device(settings.device)
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    found = []
    for given in (settings.model, *settings.models):
        find = partial(_named, given)

        def build(find: Callable[[], NamedModel] = find) -> Encoder:
            return TorchEncoder(
                find(), device=settings.device, attention_pixels=settings.attention_pixels
            )

        found.append(make_model(model_info(find()), build, settings))
    return Models(found)


def make_model(info: ModelInfo, build: Callable[[], Encoder], settings: Settings) -> Model:
    """A model that is loaded by `build`, and then has a queue of its own."""

    def load() -> Vision:
        vision = Vision(
            build(),
            Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels),
            decode_threads=settings.decode_threads,
            max_batch=settings.max_batch_size,
            max_waiting=settings.max_queue,
        )
        try:
            vision.warm_up()
        except BaseException:
            vision.close()
            raise
        return vision

    return Model(info=info, load=load)


def _named(given: str) -> NamedModel:
    """`MODEL`, or `NAME=MODEL`; a path may hold "=" too."""
    with_name = re.fullmatch(r"([\w.-]+)=(.+)", given)
    if with_name is None:
        return load_model(given)
    return replace(load_model(with_name[2]), name=with_name[1])


class _Page(Mount):
    """The page's files, after every route: a plain mount of `/` would make each 405 a 404."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        if match is Match.NONE or scope.get("method") not in ("GET", "HEAD"):
            return Match.NONE, {}
        return Match.PARTIAL, child_scope


def _start(settings: Settings, models: Models | None) -> Services:
    quiet_decoders()
    models = models or find_models(settings)
    try:
        for info in models.infos if settings.load_models == "start" else models.infos[:1]:
            models.vision(info.name)
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
    services.models.close()
    services.collections.close()
