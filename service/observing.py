"""The outermost middleware: each request gets an id, one line in the log, and is counted."""

import asyncio
import logging
import random
import re
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import error_response, internal_error
from service.measurements import Measurements, measuring
from service.metrics import METHODS, OTHER_METHOD, UNKNOWN_ROUTE, Metrics
from service.tracing import Tracing

CLIENT_LEFT = 499  # nginx's number for a client that closed the connection before the answer
PAGE = "/{page}"  # the files of the web page, and the viewer of the API
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds
_log = logging.getLogger("service.requests")


class Observed:
    """ASGI middleware; it also answers what nobody foresaw, so that this is seen as well.

    Args:
        deadline_s: the time limit that each request carries; see `Measurements`.
        tracing: where spans go; None: nowhere.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, deadline_s: float, tracing: Tracing | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request and then tells of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Measurements(request_id=_request_id(scope), deadline_s=self._deadline_s)
        traffic = _Traffic(receive, send, request)
        self._metrics.in_progress.inc()
        try:
            with measuring(request):
                await self._serve(scope, traffic)
        finally:
            self._metrics.in_progress.dec()
            self._tell(scope, request, traffic)

    async def _serve(self, scope: Scope, traffic: "_Traffic") -> None:
        try:
            await self._app(scope, traffic.receive, traffic.send)
        except asyncio.CancelledError:
            # uvicorn, or the end of a service whose thread died: the time to finish is over.
            if traffic.status is None:
                response = error_response(503, "the service is stopping", code="shutting_down")
                await response(scope, traffic.receive, traffic.send)
            raise
        except Exception as error:
            _log.error("%s failed", _route(scope) or UNKNOWN_ROUTE, exc_info=error)
            if traffic.status is None:
                await internal_error()(scope, traffic.receive, traffic.send)
            else:
                raise  # too late for an answer; the server closes the connection

    def _tell(self, scope: Scope, request: Measurements, traffic: "_Traffic") -> None:
        seconds = time.monotonic() - request.started
        status = traffic.status
        if status is None:
            status = CLIENT_LEFT if request.client_left else 500
        route = _route(scope) or (PAGE if status < 400 else None)
        self._metrics.request_done(
            route=route,
            method=scope["method"],
            status=status,
            seconds=seconds,
            code=request.error_code,
        )
        self._metrics.bodies(received_bytes=traffic.received_bytes, sent_bytes=traffic.sent_bytes)
        self._metrics.pictures_done(request.pictures, request.picture_bytes)
        fields = _fields(scope, request, traffic, route or UNKNOWN_ROUTE, status, seconds)
        if self._tracing is not None:
            fields["trace_id"] = self._tracing.record(request, fields, headers=scope["headers"])
        quiet = route in _QUIET and status in (200, 503)
        _log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


class _Traffic:
    """Counts what passes, puts the request's id into the answer, and sees when the body is read."""

    def __init__(self, receive: Receive, send: Send, request: Measurements) -> None:
        self._receive = receive
        self._send = send
        self._request = request
        self.status: int | None = None
        self.received_bytes = 0
        self.sent_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.received_bytes += len(message.get("body", b""))
            if not message.get("more_body") and self._request.body_read is None:
                self._request.body_read = time.monotonic()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = (b"x-request-id", self._request.request_id.encode())
            message = {**message, "headers": [*message.get("headers", []), own]}
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-ID` where it can stand in a log, else a new one.

    `uuid4` would ask the system, and wait for the interpreter's lock when it is back; nobody
    relies on these being hard to guess.
    """
    given: bytes = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def _route(scope: Scope) -> str | None:
    """The route's template; paths themselves hold people's names and are told nowhere."""
    path: str | None = getattr(scope.get("route"), "path_format", None)
    return path


def _fields(
    scope: Scope,
    request: Measurements,
    traffic: _Traffic,
    route: str,
    status: int,
    seconds: float,
) -> dict[str, Any]:
    client = scope.get("client")
    fields = {
        "request_id": request.request_id,
        "method": scope["method"] if scope["method"] in METHODS else OTHER_METHOD,
        "route": route,
        "status": status,
        "error_code": request.error_code,
        "client": client[0] if client else None,
        "model": request.model,
        "pictures": request.pictures,
        "sizes": [f"{width}x{height}" for width, height in request.sizes],
        "received_bytes": traffic.received_bytes,
        "sent_bytes": traffic.sent_bytes,
        "total_s": round(seconds, 6),
    }
    for name in ("decode_wait", "decode", "queue", "inference", "search"):
        spent = request.seconds(name)
        if spent is not None:
            fields[f"{name}_s"] = round(spent, 6)
    return fields
