"""Traces: to memory, and over the wire to a collector of the test's own."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import Settings
from service.tracing import TracingUnavailable, open_tracing
from tests.service.answers import error_of, json_of
from tests.service.fakes import PATIENCE_S, FakeEncoder, created
from tests.service.pictures import png

pytest.importorskip("opentelemetry.sdk", reason="the extra 'telemetry' is not installed")
trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytestmark = pytest.mark.anyio


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An endpoint, and what was sent to it."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()
    thread.join(PATIENCE_S)
    server.server_close()


async def test_a_search_as_a_trace(tmp_path: Path, collector: tuple[str, list[bytes]]) -> None:
    endpoint, bodies = collector
    settings = Settings(_env_file=None, data_dir=tmp_path, otlp_endpoint=endpoint)
    app = created(settings, FakeEncoder())
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        path = "/v1/collections/default/search?k=1"
        headers = {"traceparent": f"00-{trace}-{caller}-01"}
        json_of(await client.post(path, files={"image": ("a.png", png(1))}, headers=headers))
        error_of(await client.get("/v1/collections/default/images/secret"), 404)
    spans = [
        span
        for body in bodies
        for resource in trace_service.ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert "secret" not in str(spans)
    (top,) = [span for span in spans if span.name == "POST /v1/collections/{name}/search"]
    assert (top.trace_id.hex(), top.parent_span_id.hex()) == (trace, caller)
    told = {attribute.key: attribute.value for attribute in top.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["dinoscope.model"].string_value == "fake"
    inside = {span.name: span for span in spans if span.parent_span_id == top.span_id}
    assert list(inside) == ["decode_wait", "decode", "queue", "inference", "search"]
    clock = top.start_time_unix_nano
    for span in inside.values():
        assert clock <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= top.end_time_unix_nano
        # One follows another, but for what a thread does after it has handed its work on.
        clock = span.start_time_unix_nano
    (other,) = [span for span in spans if span.name == "GET /v1/collections/{name}/images/{id}"]
    assert other.trace_id.hex() != trace


async def test_a_collector_that_is_away_holds_nothing_up(tmp_path: Path) -> None:
    settings = Settings(
        _env_file=None, data_dir=tmp_path, otlp_endpoint="http://127.0.0.1:9/v1/traces"
    )
    app = created(settings, FakeEncoder())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        json_of(await client.get("/v1/models"))


def test_traces_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TracingUnavailable, match=r"dinoscope\[telemetry\]"):
        open_tracing("http://127.0.0.1:9")
