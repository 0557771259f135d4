from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.settings import Settings
from tests.service.fakes import FakeEncoder, created

Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def make_app(tmp_path: Path, encoder: FakeEncoder) -> Callable[..., FastAPI]:
    """An application on the test's own folder; `model` and settings may be others."""

    def make(
        *, model: FakeEncoder | None = None, others: Sequence[FakeEncoder] = (), **settings: Any
    ) -> FastAPI:
        given = {"data_dir": tmp_path / "data", "decode_threads": 2, **settings}
        return created(Settings(_env_file=None, **given), model or encoder, *others)

    return make


@pytest.fixture
def serve(make_app: Callable[..., FastAPI], encoder: FakeEncoder) -> Serve:
    """`async with serve(...) as client`: an application from its start to its end."""

    @asynccontextmanager
    async def run(*, raise_errors: bool = True, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = make_app(**options)
        transport = httpx.ASGITransport(app, raise_app_exceptions=raise_errors)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            encoder.calls.clear()
            yield client

    return run


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with serve() as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture(scope="module")
async def shared_client(
    shared_encoder: FakeEncoder, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.AsyncClient]:
    """One application for a module whose tests leave nothing behind; starting one takes time."""
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path_factory.mktemp("shared"),
        cache_bytes=0,  # tests count what is computed
    )
    app = created(settings, shared_encoder)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        yield client
