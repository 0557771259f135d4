"""The page in a real browser, against a real server with the repository's model."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from service.keys import add_key, remove_key
from tests.e2e.running import ROOT, running_service

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

MODEL = ROOT / "backbone" / "models" / "default.safetensors"
CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 30_000
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


def picture(number: int) -> Image.Image:
    """Smooth stripes whose direction, width and colours differ from number to number."""
    rows, columns = np.mgrid[0:120, 0:160] / 120.0
    angle = number * 0.7
    wave = np.sin((3 + 2 * number) * (columns * np.cos(angle) + rows * np.sin(angle)) * 2)
    colour = np.random.default_rng(number).uniform(40, 215, (2, 3))
    share = (wave[..., None] + 1) / 2
    return Image.fromarray((share * colour[0] + (1 - share) * colour[1]).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running service that holds a few pictures."""
    with running_service(tmp_path_factory.mktemp("service")) as url:
        _fill(url)
        yield url


def _fill(url: str, **headers: str) -> None:
    with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
        for number in range(6):
            content = encoded(picture(number), "PNG")
            answer = client.post(
                "/v1/collections/default/images",
                files={"image": (f"{number}.png", content, "image/png")},
                data={"id": f"stripes/{number} a&b.png", "metadata": "{}"},
            )
            answer.raise_for_status()
        client.put("/v1/collections/empty").raise_for_status()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is absent")
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


def expect(page: Any, selector: str) -> Any:
    """Waits for what is then asked of the element; works under the page's policy, unlike eval."""
    return playwright.expect(page.locator(selector))


def choose(page: Any, name: str, content: bytes, kind: str = "image/jpeg") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})
    expect(page, "#picture-name").to_have_text(name)


def wait_until_idle(page: Any) -> None:
    expect(page, '[aria-busy="true"]').to_have_count(0)


def match_ids(page: Any) -> list[str]:
    wait_until_idle(page)
    return page.eval_on_selector_all(".match[data-id]", "all => all.map(one => one.dataset.id)")


def map_widths(page: Any) -> list[int]:
    return page.eval_on_selector_all(
        "#maps img", "all => all.map(one => one.hidden ? 0 : one.naturalWidth)"
    )


def colormaps(server: str) -> list[str]:
    described = httpx.get(f"{server}/openapi.json").json()["paths"]["/v1/attention"]["post"]
    [colormap] = [one for one in described["parameters"] if one["name"] == "colormap"]
    return colormap["schema"]["enum"]


def test_a_chosen_picture_shows_its_maps_and_finds_itself(
    page: Any, server: str, complaints: list[str]
) -> None:
    model = httpx.get(f"{server}/v1/models").json()["data"][0]
    assert str(model["embedding_size"]) in page.text_content("#fact-embedding")
    assert model["architecture"] in page.text_content("#fact-model")
    assert "6 pictures" in page.text_content("#fact-collection")
    options = page.eval_on_selector_all("#colormap option", "all => all.map(one => one.value)")
    assert options == colormaps(server)

    choose(page, "again.jpg", encoded(picture(3), "JPEG", quality=90))
    ids = match_ids(page)

    assert ids[0] == "stripes/3 a&b.png"
    assert len(ids) == 6
    assert map_widths(page) == [480] * (model["heads"] + 1)
    assert all(page.eval_on_selector_all("#maps img", "all => all.map(one => one.alt)"))
    playwright.expect(page.locator(".match img").first).to_have_js_property("naturalWidth", 160)
    score = float(page.text_content(".match .match-detail").removeprefix("score "))
    assert 0.95 < score <= 1.0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    with page.expect_response(lambda answer: "colormap=gray" in answer.url):
        page.select_option("#colormap", "gray")
    wait_until_idle(page)
    with page.expect_response(lambda answer: "threshold=0.95" in answer.url):
        page.press("#threshold", "ArrowLeft")
    wait_until_idle(page)
    assert min(map_widths(page)) > 0
    playwright.expect(page.locator(".match img:not([hidden])")).to_have_count(6)
    shown = page.eval_on_selector_all(
        "#maps img, #preview, .match img", "all => all.map(one => one.src)"
    )
    assert set(page.evaluate("[...window.liveUrls]")) == set(shown)
    assert complaints == []


def test_a_neighbour_searches_by_its_id_and_there_is_a_way_back(
    page: Any, complaints: list[str]
) -> None:
    choose(page, "again.jpg", encoded(picture(1), "JPEG", quality=90))
    before = match_ids(page)

    with page.expect_request("**/search") as asked:
        page.locator(".match").nth(1).click()
    assert json.loads(asked.value.post_data)["id"] == before[1]
    after = match_ids(page)
    assert before[1] not in after
    assert page.text_content("#picture-name") == before[1]
    assert min(map_widths(page)) > 0  # drawn from the thumbnail

    page.click("#back")
    expect(page, "#picture-name").to_have_text("again.jpg")
    assert match_ids(page) == before
    assert complaints == []


def test_what_the_server_refuses_is_said_in_its_words(page: Any, complaints: list[str]) -> None:
    choose(page, "notes.txt", b"no picture at all", "text/plain")
    page.wait_for_selector("#picture-error:not([hidden])")
    assert "is not a picture of an allowed format" in page.text_content("#picture-error")
    assert page.locator(".error:visible").count() == 1  # once, not once a request
    # The browser itself notes every answer of 400 and above; nothing else may stand there.
    assert all("status of 415" in line for line in complaints)


def asked_of_maps(page: Any, act: Any) -> list[dict[str, str]]:
    """The queries of the maps that the page asks for because of what `act` does."""
    asked: list[dict[str, str]] = []

    def note(request: Any) -> None:
        if "/v1/attention?" in request.url:
            asked.append(dict(parse_qsl(urlsplit(request.url).query)))

    page.on("request", note)
    with page.expect_response("**/v1/attention?*"):
        act()
    wait_until_idle(page)
    page.remove_listener("request", note)
    return asked


def test_other_maps(page: Any, server: str, complaints: list[str]) -> None:
    [model] = httpx.get(f"{server}/v1/models").json()["data"]
    choose(page, "again.jpg", encoded(picture(3), "JPEG", quality=90))
    wait_until_idle(page)

    asked = asked_of_maps(page, lambda: page.select_option("#block", "2"))
    heads = ["mean", *map(str, range(model["heads"]))]
    assert sorted(query["head"] for query in asked) == sorted(heads)
    assert {query["block"] for query in asked} == {"2"}

    [query] = asked_of_maps(page, lambda: page.select_option("#view", "rollout"))
    assert query["rollout"] == "true"
    assert not {"block", "head", "view", "point"} & set(query)
    assert page.locator("#block").is_disabled()
    assert "over all blocks" in page.text_content("#attention-note")

    [query] = asked_of_maps(page, lambda: page.select_option("#view", "pca"))
    assert query["view"] == "pca"
    assert not {"block", "head", "point", "colormap"} & set(query)
    assert page.locator("#attention input:enabled").count() == 1  # the overlay
    assert map_widths(page) == [480]

    [query] = asked_of_maps(page, lambda: page.select_option("#view", "similarity"))
    assert (query["view"], query["point"]) == ("similarity", "0.5000,0.5000")
    assert page.locator("#marker").is_visible()
    assert complaints == []


def middle(box: dict[str, float]) -> tuple[float, float]:
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_click_in_a_picture_chooses_a_point(page: Any, complaints: list[str]) -> None:
    page.set_viewport_size({"width": 1200, "height": 800})
    wide = picture(3).resize((320, 120))  # it does not fill its frame
    choose(page, "wide.jpg", encoded(wide, "JPEG", quality=90))
    wait_until_idle(page)
    assert page.locator("#marker").is_hidden()
    page.select_option("#view", "rollout")
    wait_until_idle(page)

    box = page.locator("#preview").bounding_box()
    x, y = middle(box)
    height = box["width"] * 120 / 320
    page.mouse.click(x, y + 0.7 * height)  # beside the picture, in its frame
    assert page.input_value("#point-x") == ""
    [query] = asked_of_maps(
        page, lambda: page.mouse.click(x - 0.25 * box["width"], y + 0.3 * height)
    )
    chosen = [float(number) for number in query["point"].split(",")]
    assert chosen == pytest.approx([0.25, 0.8], abs=0.008)  # whole pixels
    shown = [float(page.input_value(f"#point-{axis}")) for axis in "xy"]
    assert shown == pytest.approx([100 * number for number in chosen])
    [query] = asked_of_maps(page, lambda: page.fill("#point-y", "80"))
    assert query["point"] == f"{chosen[0]:.4f},0.8000"
    assert "s patch looks" in page.text_content("#attention-note")
    for width in (1200, 700):  # it stays there
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(100)
        box, mark = (page.locator(f"#{one}").bounding_box() for one in ("preview", "marker"))
        there = middle(mark)[0] - middle(box)[0], middle(mark)[1] - middle(box)[1]
        height = min(box["height"], box["width"] * 120 / 320)
        assert there == pytest.approx((-0.25 * height * 320 / 120, 0.3 * height), abs=2)

    [query] = asked_of_maps(page, lambda: page.fill("#point-x", "60"))
    assert query["point"] == "0.6000,0.8000"
    [query] = asked_of_maps(page, lambda: page.fill("#point-x", "160"))  # no such place
    assert "point" not in query
    assert page.locator("#marker").is_hidden()
    assert "numbers from 0 to 100" in page.text_content("#attention-note")
    [query] = asked_of_maps(page, lambda: page.locator("#maps img").click())
    chosen = [float(number) for number in query["point"].split(",")]
    assert chosen == pytest.approx([0.5, 0.5], abs=0.021)
    [query] = asked_of_maps(page, lambda: page.press("#no-point", "Enter"))
    assert "point" not in query
    assert page.evaluate("document.activeElement.id") == "point-x"
    assert "the CLS token" in page.text_content("#attention-note")

    page.locator("#maps img").click()
    wait_until_idle(page)
    choose(page, "next.jpg", encoded(picture(4), "JPEG", quality=90))
    wait_until_idle(page)
    assert page.input_value("#point-x") == ""  # a point is one of one picture
    assert page.locator("#marker").is_hidden()
    assert complaints == []


def test_a_model_without_attention_says_so_and_draws_what_it_has(
    page: Any, server: str, complaints: list[str]
) -> None:
    models = httpx.get(f"{server}/v1/models").json()
    models["data"][0].update(architecture="resnet50", heads=0, blocks=0, patch_size=None)
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page, "#fact-model").to_contain_text("resnet50")
    choose(page, "again.jpg", encoded(picture(3), "JPEG", quality=90))
    assert match_ids(page)[0] == "stripes/3 a&b.png"
    assert "no attention" in page.text_content("#attention-note")
    assert map_widths(page) == [480]
    assert page.locator("#view option:enabled").count() == 2
    maps = [url for url in asked if "/v1/attention" in url]
    assert maps
    assert all("view=pca" in url for url in maps)
    assert page.locator(".error:visible").count() == 0
    assert complaints == []


def test_a_server_that_is_gone_is_said_and_can_be_tried_again(page: Any) -> None:
    page.route("**/v1/**", lambda route: route.abort())
    choose(page, "again.jpg", encoded(picture(1), "JPEG"))
    page.wait_for_selector("#neighbours-error:not([hidden])")
    assert "does not answer" in page.text_content("#neighbours-error")
    page.unroute("**/v1/**")
    page.click("#neighbours-error button")
    assert len(match_ids(page)) == 6
    assert page.locator(".error:visible").count() == 0


def test_a_late_answer_does_not_replace_a_newer_one(page: Any, complaints: list[str]) -> None:
    held: list[Any] = []

    def hold_first(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/search?*", hold_first)
    choose(page, "first.jpg", encoded(picture(2), "JPEG"))
    while not held:
        page.wait_for_timeout(20)
    choose(page, "second.jpg", encoded(picture(4), "JPEG"))
    expect(page, "#neighbours-note").to_contain_text("second.jpg")
    held[0].fulfill(json={"matches": [{"id": "late", "score": 1.0, "metadata": {}}]})
    page.wait_for_timeout(100)
    assert match_ids(page)[0] == "stripes/4 a&b.png"
    assert complaints == []


def test_a_picture_is_added_to_the_chosen_collection(
    page: Any, server: str, complaints: list[str]
) -> None:
    page.select_option("#collection", "empty")
    # Dropped this time; its name is markup, and must stay text.
    page.evaluate(
        """(bytes) => {
          const transfer = new DataTransfer();
          const name = "<b>new.png";
          transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          document.body.dispatchEvent(
            new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        list(encoded(picture(9), "PNG")),
    )
    expect(page, "#neighbours-note").to_have_text("“empty” holds no picture yet.")
    page.click("#add")
    page.wait_for_selector(".match[data-id]")
    wait_until_idle(page)
    assert page.text_content(".match .match-name") == "<b>new.png"
    assert "1 picture" in page.text_content("#fact-collection")
    assert httpx.get(f"{server}/v1/collections/empty").json()["count"] == 1
    assert complaints == []


def test_the_description_needs_nothing_from_elsewhere(
    page: Any, server: str, complaints: list[str]
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.click("text=documentation")
    expect(page, ".opblock-summary-path").not_to_have_count(0)
    expect(page, "body").to_contain_text("The nearest pictures")
    assert all(url.startswith((server, "data:")) for url in asked), asked
    assert complaints == []


def test_a_service_with_keys_below_a_path_asks_for_one(browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    writing = add_key(keys, "writer", may_write=True)
    reading = add_key(keys, "reader", may_write=False)
    given = {"keys_file": str(keys), "root_path": "/eyes"}
    with running_service(tmp_path, **given) as url:
        _fill(url, Authorization=f"Bearer {writing}")
        told = {"Host": "pictures.example", "X-Forwarded-Proto": "https"}  # by a proxy
        moved = httpx.get(f"{url}/eyes", headers=told)
        assert moved.headers["location"] == "https://pictures.example/eyes/"
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(f"{url}/eyes/")
        expect(page, "#key-text").to_have_text("This service asks for a key.")
        assert page.locator(".error:visible").count() == 0
        page.fill("#key", "dinoscope_wrong")
        page.press("#key", "Enter")
        expect(page, "#key-text").to_contain_text("does not know this key")
        page.fill("#key", reading)
        page.click("text=Use this key")
        expect(page, "#key-form").to_be_hidden()
        expect(page, "#fact-collection").to_contain_text("6 pictures")

        choose(page, "again.jpg", encoded(picture(3), "JPEG", quality=90))
        assert match_ids(page)[0] == "stripes/3 a&b.png"
        playwright.expect(page.locator(".match img").first).to_have_js_property("naturalWidth", 160)
        assert min(map_widths(page)) > 0
        page.click("#add")
        expect(page, "#picture-error").to_contain_text("'reader' is read-only")

        page.click("text=documentation")  # with the same key
        expect(page, ".opblock-summary-path").not_to_have_count(0)
        page.goto(f"{url}/eyes/")
        expect(page, "#fact-collection").to_contain_text("6 pictures")  # the tab remembers it
        remove_key(keys, "reader")
        choose(page, "again.jpg", encoded(picture(3), "JPEG", quality=90))
        expect(page, "#key-text").to_contain_text("does not know this key")
        page.fill("#key", writing)
        page.press("#key", "Enter")
        page.wait_for_selector(".match[data-id]")  # the search waits for what the service tells
        assert match_ids(page)[0] == "stripes/3 a&b.png"
        page.click("#add")
        expect(page, "#status").to_contain_text("is in “default” now")
        assert "key" not in page.url
        context.close()
    assert not any(key in (tmp_path / "log.txt").read_text() for key in (writing, reading))
