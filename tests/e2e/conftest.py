"""A running service, a real browser, and the page in it."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.browsing import WAIT_MS, fill
from tests.e2e.running import running_service

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
COUNT_URLS = """
window.liveUrls = new Set();
const create = URL.createObjectURL, revoke = URL.revokeObjectURL;
URL.createObjectURL = (blob) => {
  const url = create.call(URL, blob);
  window.liveUrls.add(url);
  return url;
};
URL.revokeObjectURL = (url) => {
  window.liveUrls.delete(url);
  revoke.call(URL, url);
};
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running service that holds a few pictures."""
    with running_service(tmp_path_factory.mktemp("service")) as url:
        fill(url)
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is absent")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        playwright.expect.set_options(timeout=WAIT_MS)
        yield running
        running.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console said, and errors that no script caught."""
    return []


@pytest.fixture
def page(browser: Any, server: str, complaints: list[str]) -> Iterator[Any]:
    """The page, loaded, under the Content-Security-Policy that the service gives it."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.add_init_script(COUNT_URLS)
    opened.goto(f"{server}/")
    opened.wait_for_selector("#maps figure")
    yield opened
    context.close()
