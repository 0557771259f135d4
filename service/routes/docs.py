"""The viewer of the API's description: a page of `web/`, and Swagger UI out of a package.

FastAPI's own would load Swagger UI from elsewhere, and needs a script inside its page.
"""

from fastapi import APIRouter
from fastapi.responses import RedirectResponse

VIEWER = "/swagger"  # where the package's files stand
VIEWER_FILES = ("fastapi_offline", "static")
LOADED = frozenset({f"{VIEWER}/swagger-ui-bundle.js", f"{VIEWER}/swagger-ui.css"})

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def docs() -> RedirectResponse:
    """The page is a file, so that it works where this route wants a key that browsers lack."""
    return RedirectResponse("docs.html")
