"""The door: what a request meets before any route, and what every answer carries.

From the outside inwards: the root path, CORS, headers, keys. Each is there only where the settings
ask for it, except the headers.
"""

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import error_response
from service.keys import KeyRing
from service.settings import Settings

# What the page and the viewer of the API get by with: their own files, nothing inline. Swagger's
# style sheet holds its icons as data.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")
_PROBES = frozenset({"/healthz", "/readyz"})
# What a read-only key may ask for beside GET. All else may write, so that a new route may too.
_READING_POSTS = re.compile(
    r"/v1/(embeddings|attention|collections/[^/]+/(search|copies|classify))"
)


def add_door(
    app: FastAPI, settings: Settings, *, web: Path, others: Set[str] = frozenset()
) -> None:
    """Puts the door before an application whose routes are all there.

    Args:
        web: the folder of the page's files, which stand at `/` and need no key.
        others: paths of further files that the page loads.

    Raises:
        KeysError: the file of keys cannot be used.
    """
    files = {f"/{path.relative_to(web).as_posix()}" for path in web.rglob("*") if path.is_file()}
    page = frozenset({"", "/", *files, *others})
    if settings.keys_file is not None:
        public = page | _PROBES
        app.add_middleware(KeyCheck, keys=KeyRing(settings.keys_file), public=public)
        _describe_keys(app.openapi(), public)
    app.add_middleware(AnswerHeaders, page=page)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # clients send headers of their own; keys are no cookies
            expose_headers=["Retry-After", "WWW-Authenticate"],
        )
    if settings.root_path:
        app.add_middleware(RootPath, root_path=settings.root_path)


def only_reads(method: str, path: str) -> bool:
    """Whether a read-only key may do it; whatever is not known to only read may not."""
    if method in ("GET", "HEAD"):
        return True
    return method == "POST" and _READING_POSTS.fullmatch(path) is not None


class KeyCheck:
    """ASGI middleware that lets nothing pass without a key, but GET and HEAD of `public` paths.

    It looks at method, path and headers alone, so the body of a refused request is never read.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, public: Set[str]) -> None:
        self._app = app
        self._keys = keys
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 without a known key, and 403 to a read-only key that might write."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        method, path = scope.get("method", ""), route_path(scope)
        if method in ("GET", "HEAD") and path in self._public:
            await self._app(scope, receive, send)
            return
        token = _token(scope)
        key = None if token is None else self._keys.find(token)
        if key is None:
            message = (
                "a key is needed: send the header `Authorization: Bearer KEY`"
                if token is None
                else "the key in `Authorization: Bearer KEY` is not one of this service"
            )
            await _refuse(401, message, "invalid_api_key", scope, receive, send)
        elif key.may_write or only_reads(method, path):
            await self._app(scope, receive, send)
        else:
            message = f"the key {key.name!r} is read-only, and {method} {path} may write"
            await _refuse(403, message, "insufficient_permissions", scope, receive, send)


class AnswerHeaders:
    """ASGI middleware that adds the headers which tell browsers to be careful.

    The page's files are looked for anew each time (ETag: 304), so that a new version shows at once.
    """

    def __init__(self, app: ASGIApp, *, page: Set[str]) -> None:
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of the page's headers it leaves alone what the application set itself."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_page = route_path(scope) in self._page

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), _NO_SNIFFING]
                if is_page:
                    headers = MutableHeaders(scope=message)
                    headers.setdefault("Content-Security-Policy", _POLICY)
                    headers.setdefault("Referrer-Policy", "no-referrer")
                    headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await self._app(scope, receive, with_headers)


class RootPath:
    """ASGI middleware for a service that a proxy shows below a path of its own.

    Proxies that take the path away before they ask the service are as good as those that leave it.
    """

    def __init__(self, app: ASGIApp, *, root_path: str) -> None:
        self._app = app
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes of either what ASGI wants: `root_path`, and a `path` that begins with it."""
        if scope["type"] != "lifespan":
            path = scope["path"]
            if path != self._root and not path.startswith(f"{self._root}/"):
                path = self._root + path
            scope.update(path=path, root_path=self._root)
        await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path that routes are matched with."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path == root or path.startswith(f"{root}/") else path


def _token(scope: Scope) -> bytes | None:
    """What stands after `Bearer`; None without such a header, or with several."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, token = given[0].partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


async def _refuse(
    status: int, message: str, code: str, scope: Scope, receive: Receive, send: Send
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message})
        return
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    await error_response(status, message, code=code, headers=headers)(scope, receive, send)


def _describe_keys(schema: dict[str, Any], public: Set[str]) -> None:
    """Says in the API's description which routes want a key; the schema is changed in place."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            if path in public:
                continue
            operation["security"] = [{"key": []}]
            told = {"401": "No key, or not one of this service."}
            if not only_reads(method.upper(), path):
                told["403"] = "The key is read-only."
            operation["responses"] |= {
                status: {"description": text, "content": content} for status, text in told.items()
            }
