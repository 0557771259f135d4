"""What tests of the page share: pictures, and what is done in a browser."""

import io
from typing import Any

import httpx
import numpy as np
from PIL import Image

WAIT_MS = 30_000


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


def fill(url: str, **headers: str) -> None:
    """Puts a few pictures into a service."""
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


def expect(page: Any, selector: str) -> Any:
    """Waits for what is then asked of the element; works under the page's policy, unlike eval."""
    from playwright.sync_api import expect as expect_of  # where there is a page, it is installed

    return expect_of(page.locator(selector))


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
