"""Routes that are asked most, without what the framework does for those that need it."""

from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from service.door import route_path


class Direct(BaseRoute):
    """Calls the function of an API route that asks for the request alone.

    FastAPI looks for the route twice and solves a function's parameters, .1 to .15 ms where the
    model has taken the caches. It stays with the route itself, which describes it, and gets the
    requests that do not fit here; errors end in the application's handlers all the same.

    Raises:
        ValueError: a route whose path has parameters.
    """

    def __init__(self, route: APIRoute) -> None:
        if route.param_convertors:
            raise ValueError(f"{route.path} has parameters, which are FastAPI's to solve")
        self._route = route
        self._methods = frozenset(route.methods or ())

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether it is this path and one of its methods; nothing is said of other methods."""
        route = self._route
        if scope.get("method") in self._methods and route_path(scope) == route.path:
            return Match.FULL, {"endpoint": route.endpoint, "path_params": {}, "route": route}
        return Match.NONE, {}

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        """The route itself knows."""
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        response = await self._route.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)
