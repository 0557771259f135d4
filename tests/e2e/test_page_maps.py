"""The page's maps in a real browser, against a real server with the repository's model."""

from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest

from tests.e2e.browsing import (
    choose,
    encoded,
    expect,
    map_widths,
    match_ids,
    picture,
    wait_until_idle,
)


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
