"""One table from exception to status, and one JSON shape for every error.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

RequestError
  ImageError: a picture that cannot be read, is too large, or is none
QueueFull (service.batcher): the service is at its limit
CollectionError and its kinds (index.errors)
"""

import logging
import reprlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from index import errors as index_errors
from service import measurements
from service.deadlines import DeadlineExceeded, WaitedTooLong
from service.jobs import BatcherClosed, BatchFailed, QueueFull

_log = logging.getLogger("service")


class RequestError(Exception):
    """A user's mistake: `code` tells programs what it was, `message` people.

    Args:
        param: the field, query parameter or position that was wrong, e.g. "input[2]".
    """

    status = 400

    def __init__(
        self, message: str, *, code: str, param: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        if status is not None:
            self.status = status


class ImageError(RequestError):
    """A picture that cannot be taken; 400, 413, 415 or 429 as its `status` says."""


# First match wins, so that a kind stands before its base.
_INDEX_STATUS: Mapping[type[index_errors.CollectionError], tuple[int, str]] = MappingProxyType(
    {
        index_errors.CollectionNotFound: (404, "collection_not_found"),
        index_errors.CollectionExists: (409, "collection_exists"),
        index_errors.RecordNotFound: (404, "image_not_found"),
        index_errors.InvalidName: (400, "invalid_name"),
        index_errors.InvalidVector: (400, "invalid_vector"),
        index_errors.InvalidRecord: (400, "invalid_record"),
        index_errors.InvalidCursor: (400, "invalid_cursor"),
        index_errors.InvalidFilter: (400, "invalid_filter"),
        index_errors.InvalidSettings: (400, "invalid_settings"),
        index_errors.SnapshotNotFound: (404, "snapshot_not_found"),
        index_errors.SnapshotDamaged: (409, "snapshot_damaged"),
        index_errors.ModelMismatch: (409, "model_mismatch"),
        index_errors.StoreDamaged: (503, "store_damaged"),
        index_errors.StoreFailed: (507, "store_failed"),
        index_errors.CollectionError: (503, "store_unavailable"),
    }
)
_COME_AGAIN = MappingProxyType({"Retry-After": "1"})  # seconds
# The part of a request that these are about.
_INDEX_PARAM: Mapping[type[index_errors.CollectionError], str] = MappingProxyType(
    {
        index_errors.InvalidCursor: "cursor",
        index_errors.InvalidFilter: "filter",
        index_errors.InvalidSettings: "index",
    }
)


def error_response(
    status: int,
    message: str,
    *,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The one shape of an error; the type follows from the status."""
    measurements.current().error_code = code
    kind = {404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def busy_response(status: int, message: str, *, code: str, retry_after_s: int = 1) -> JSONResponse:
    """An error that passes: `Retry-After` says when to come again."""
    headers = {"Retry-After": str(retry_after_s)}
    return error_response(status, message, code=code, headers=headers)


def internal_error() -> JSONResponse:
    """The answer to what nobody foresaw."""
    message = "an error of the service's own; its log tells more"
    return error_response(500, message, code="internal_error")


def _place(location: Sequence[int | str]) -> str:
    """Pydantic's location as the user wrote it: images[1].id."""
    parts = location[1:] if location[:1] in (("query",), ("body",), ("path",)) else location
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".")


def _methods_at(request: Request) -> list[str]:
    """Every method of a path: the framework names those of the first route that fits alone."""

    def answers(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [m for m in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT") if answers(m)]


def add_error_handlers(app: FastAPI) -> None:
    """Answers every exception, known or not, in the one shape."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return error_response(
            error.status, error.message, code=error.code, param=error.param, headers=headers
        )

    @app.exception_handler(index_errors.CollectionError)
    async def collection_error(_: Request, error: index_errors.CollectionError) -> JSONResponse:
        status, code = next(
            answer for kind, answer in _INDEX_STATUS.items() if isinstance(error, kind)
        )
        if status >= 500:
            _log.error("%s", error, exc_info=error)
        return error_response(status, str(error), code=code, param=_INDEX_PARAM.get(type(error)))

    @app.exception_handler(QueueFull)
    async def queue_full(_: Request, error: QueueFull) -> JSONResponse:
        code = "queue_too_long" if error.reason == "deadline" else "queue_full"
        return busy_response(429, str(error), code=code, retry_after_s=error.retry_after_s)

    @app.exception_handler(WaitedTooLong)
    async def waited(_: Request, error: WaitedTooLong) -> JSONResponse:
        return busy_response(
            429, str(error), code="queue_timeout", retry_after_s=error.retry_after_s
        )

    @app.exception_handler(DeadlineExceeded)
    async def too_late(_: Request, error: DeadlineExceeded) -> JSONResponse:
        return busy_response(503, str(error), code="deadline_exceeded")

    @app.exception_handler(BatcherClosed)
    async def closed(_: Request, error: BatcherClosed) -> JSONResponse:
        return error_response(503, str(error), code="shutting_down", headers=_COME_AGAIN)

    @app.exception_handler(BatchFailed)
    async def batch_failed(_: Request, error: BatchFailed) -> JSONResponse:
        return busy_response(503, str(error), code="model_failed")

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = _place(first["loc"])
        given = first.get("input")
        shown = f" (given: {reprlib.repr(given)})" if first["type"] != "missing" else ""
        message = f"{where}: {first['msg']}{shown}" if where else f"{first['msg']}{shown}"
        return error_response(422, message, code="invalid_parameter", param=where or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = {
            404: f"no such page: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed for {request.url.path}",
        }.get(error.status_code, str(error.detail))
        code = codes.get(error.status_code, "http_error")
        headers = error.headers
        if error.status_code == 405 and (methods := _methods_at(request)):
            headers = {"Allow": ", ".join(methods)}
        return error_response(error.status_code, message, code=code, headers=headers)
