"""The page in a real browser, against a real server with the repository's model."""

import json
from pathlib import Path
from typing import Any

import httpx

from service.keys import add_key, remove_key
from tests.e2e.browsing import (
    WAIT_MS,
    choose,
    encoded,
    expect,
    fill,
    map_widths,
    match_ids,
    picture,
    wait_until_idle,
)
from tests.e2e.running import running_service


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
    expect(page, ".match img >> nth=0").to_have_js_property("naturalWidth", 160)
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
    expect(page, ".match img:not([hidden])").to_have_count(6)
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
        fill(url, Authorization=f"Bearer {writing}")
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
        expect(page, ".match img >> nth=0").to_have_js_property("naturalWidth", 160)
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
