"""A client that leaves frees its places: Starlette by itself would serve it to the end."""

import asyncio

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import measurements


class CancelledOnDisconnect:
    """ASGI middleware that cancels a request whose client closes the connection.

    It listens once the body was read. A write to a collection that has begun is finished first:
    anyio's threads are not abandoned.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request until its answer is sent, or nobody waits for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        left = asyncio.Event()
        watcher: asyncio.Task[None] | None = None
        is_answered = False
        with anyio.CancelScope() as serving:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                left.set()
                if not is_answered:
                    measurements.current().client_left = True
                    serving.cancel()

            async def listened() -> Message:
                nonlocal watcher
                if watcher is not None:
                    await left.wait()
                    return {"type": "http.disconnect"}
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body"):
                    watcher = asyncio.create_task(watch())
                return message

            async def noted(message: Message) -> None:
                nonlocal is_answered
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    is_answered = True
                await send(message)

            try:
                await self._app(scope, listened, noted)
            except ClientDisconnect:
                measurements.current().client_left = True
            finally:
                if watcher is not None:
                    watcher.cancel()
