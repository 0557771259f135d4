"""How pictures come in a request: multipart, a raw body, or JSON; and the limit on its size."""

import json
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from index.errors import InvalidFilter
from service import measurements
from service.deadlines import retry_after
from service.encoded import EncodedPicture
from service.errors import RequestError, busy_response, error_response
from service.forms import TooManyFiles, read_form

_SHARE_OF_DEADLINE = 0.6  # that may be spent behind others: the rate is a mean, and it changes
_LEAP, _LEAP_S = 10.0, 0.1  # times the mean interval, and seconds more, that one may be longer
_READ_AWAY_BYTES = 2**20  # of a body whose request is refused
_READ_AWAY_S = 1.0
_QUICKLY_PARSED = 2**16  # bytes of JSON that the event loop may parse itself

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Pictures of a multipart or raw request, with the form fields that go with each."""

    pictures: list[EncodedPicture]
    ids: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)


class BodyLimit:
    """ASGI middleware that counts a body's bytes as they come, whatever Content-Length says."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 413 before reading where the length is told, else as soon as it shows."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = RequestError(
            f"the request's body is larger than {self._max_bytes} bytes",
            code="request_too_large",
            status=413,
        )
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit() and int(told) > self._max_bytes:
            response = error_response(413, too_large.message, code=too_large.code)
            await response(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise too_large
            return message

        await self._app(scope, counted, send)


class Admission:
    """ASGI middleware that bounds the requests with a body that are under way at once.

    What they hold (bodies, decoded pictures) is thereby bounded too; more are answered 429. So are
    those that would miss their deadline at the rate at which requests get through now: to let them
    in would cost the others their time.
    """

    def __init__(self, app: ASGIApp, *, max_requests: int) -> None:
        self._app = app
        self._max_requests = max_requests
        self._under_way = 0
        self._interval_s = 0.0  # between requests that get through, as a running mean
        self._last_through = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets GET and its like pass: they carry no pictures."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        refused = self._why_not()
        if refused is not None:
            wait_s = retry_after(self._under_way * self._interval_s)
            response = busy_response(429, refused, code="too_many_requests", retry_after_s=wait_s)
            await _read_away(receive)
            await response(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
            self._count(measurements.current())

    def _count(self, request: measurements.Measurements) -> None:
        """Learn from a request that has ended how fast they get through."""
        if request.error_code is not None or request.client_left:
            return
        now, whole = time.monotonic(), request.body_read or request.started
        # While a body is awaited (another's may have been coming all the time), nothing is slow.
        interval_s = now - max(self._last_through, whole)
        # A pause of the whole process is no rate; what has become slow shows in a few requests.
        interval_s = min(interval_s, _LEAP * self._interval_s + _LEAP_S)
        self._interval_s += 0.1 * (interval_s - self._interval_s)
        self._last_through = now

    def _why_not(self) -> str | None:
        """Why one more request cannot be let in; None where it can."""
        if self._under_way >= self._max_requests:
            return f"{self._max_requests} requests are under way, which is the most; try again"
        limit_s, wait_s = measurements.current().deadline_s, self._under_way * self._interval_s
        if limit_s is not None and wait_s > _SHARE_OF_DEADLINE * limit_s:
            return f"{self._under_way} requests are under way, about {wait_s:.1f} s; try again"
        return None


async def _read_away(receive: Receive) -> None:
    """Reads a small body that nobody wants: a connection closed on it would lose the answer."""
    left = _READ_AWAY_BYTES
    with anyio.move_on_after(_READ_AWAY_S):
        while left > 0:
            message = await receive()
            if not message.get("more_body"):
                return
            left -= len(message.get("body", b""))


def is_json(request: Request) -> bool:
    """Whether the body says that it is JSON."""
    kind = _content_type(request)
    return kind == "application/json" or kind.endswith("+json")


def read_options(request: Request, model: type[Body]) -> Body:
    """The query string as `model`, not to be changed; of a name's several values the last one.

    For routes that are asked most: FastAPI's `Query()` takes a fifth of a millisecond.

    Raises:
        RequestValidationError: it is not a `model`.
    """
    if not request.scope["query_string"]:
        defaults: Body = _defaults(model)
        return defaults
    return _validated(dict(request.query_params), model, "query")


async def read_json(request: Request, model: type[Body]) -> Body:
    """The body as `model`.

    Raises:
        RequestError: a body that is not JSON, or options in the query string beside it.
        RequestValidationError: JSON that is not a `model`.
    """
    if request.query_params:
        name = next(iter(request.query_params))
        raise RequestError(
            f"{name!r} stands in the query string; with a JSON body, options are fields of it",
            code="invalid_parameter",
            param=name,
        )
    content = await request.body()
    if len(content) <= _QUICKLY_PARSED:
        return _parse(content, model)
    return await anyio.to_thread.run_sync(_parse, content, model)


def _parse(content: bytes, model: type[Body]) -> Body:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", code="invalid_json") from error
    return _validated(value, model, "body")


@cache
def _defaults(model: type[Body]) -> Body:
    return _validated({}, model, "query")


def _validated(value: Any, model: type[Body], place: str) -> Body:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError(
            [{**fault, "loc": (place, *fault["loc"])} for fault in error.errors()]
        ) from error


async def read_upload(request: Request, *, max_pictures: int, described: bool = False) -> Upload:
    """The pictures of a multipart form (field `image`, repeatable) or of a raw `image/*` body.

    Args:
        described: whether the form may have fields `id` and `metadata`.

    Raises:
        RequestError: another content type, an unknown field, no picture, or too many.
    """
    kind = _content_type(request)
    if kind.startswith("image/") or kind == "application/octet-stream":
        content = await request.body()
        return Upload(pictures=[EncodedPicture(content=content, param="body")])
    if kind != "multipart/form-data":
        raise RequestError(
            f"content type {kind or '(none)'!r} is not one of multipart/form-data (field 'image'), "
            "image/* (the picture itself) or application/json",
            code="unsupported_media_type",
            status=415,
        )
    pictures: list[EncodedPicture] = []
    fields: dict[str, list[str]] = {"id": [], "metadata": []} if described else {}
    try:
        parts = await read_form(request, max_files=max_pictures, max_texts=2 * max_pictures + 2)
    except TooManyFiles as error:
        raise _too_many(max_pictures, param="image") from error
    for part in parts:
        if part.is_file and part.name == "image":
            param = f"image[{len(pictures)}]"
            # One of them at a time is held twice.
            pictures.append(EncodedPicture(content=await part.read(), param=param))
        elif not part.is_file and part.name in fields:
            fields[part.name].append(await part.text())
        else:
            raise RequestError(
                f"form field {part.name!r} is not one of image (a file)"
                f"{', id, metadata (text)' if described else ''}; "
                "options stand in the query string",
                code="unknown_field",
                param=part.name,
            )
    _check_count(len(pictures), max_pictures, param="image")
    return Upload(pictures=pictures, ids=fields.get("id", []), metadata=fields.get("metadata", []))


async def read_one(request: Request) -> EncodedPicture:
    """The one picture of a multipart or raw request."""
    upload = await read_upload(request, max_pictures=1)
    return upload.pictures[0]


def pictures_of(values: list[str], *, max_pictures: int, param: str) -> list[EncodedPicture]:
    """Data URIs or base64 strings -> pictures, each named `param[i]` in errors."""
    _check_count(len(values), max_pictures, param=param)
    return [EncodedPicture(content=v, param=f"{param}[{i}]") for i, v in enumerate(values)]


def parse_metadata(text: str, *, param: str) -> dict[str, Any]:
    """A form field's JSON object.

    Raises:
        RequestError: text that is no JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{param} is not JSON: {error}", code="invalid_metadata", param=param
        ) from error
    if not isinstance(value, dict):
        raise RequestError(
            f"{param} is not a JSON object, it is {text[:80]}", code="invalid_metadata", param=param
        )
    return value


def parse_filter(text: str | None) -> Any:
    """The query parameter `filter` as decoded from JSON, for the index to look at; None: none.

    Raises:
        InvalidFilter: text that is no JSON.
    """
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidFilter(f"filter: it is not JSON: {error}") from error


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_count(count: int, most: int, *, param: str) -> None:
    if not count:
        raise RequestError(
            f"there is no picture in {param!r}; at least one is needed",
            code="missing_image",
            param=param,
        )
    if count > most:
        raise _too_many(most, param=param)


def _too_many(most: int, *, param: str) -> RequestError:
    return RequestError(
        f"{param!r} holds more than {most} picture{'s' if most > 1 else ''}, "
        "the most that are allowed here in one request",
        code="too_many_images",
        param=param,
        status=413 if most > 1 else 400,
    )
