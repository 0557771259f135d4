from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.encoder import AttentionTask
from service.heatmaps import COLORMAPS
from tests.service.answers import error_of, json_of
from tests.service.fakes import FakeEncoder
from tests.service.pictures import RED, data_uri, encoded, noise, opened, plain, png

pytestmark = pytest.mark.anyio
URL = "/v1/attention"
RAW = {"Content-Type": "image/png"}
WANT_JSON = {**RAW, "Accept": "application/json"}


@pytest.fixture
def encoder(shared_encoder: FakeEncoder) -> FakeEncoder:
    shared_encoder.calls.clear()
    return shared_encoder


@pytest.fixture
def client(shared_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return shared_client


async def drawn(client: httpx.AsyncClient, content: bytes, **options: Any) -> Image.Image:
    response = await client.post(URL, content=content, headers=RAW, params=options)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    picture = opened(response.content)
    assert picture.format == "PNG"
    assert picture.mode == "RGB"
    return picture


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (32, 32)])
async def test_the_picture_keeps_its_size_and_shape(
    client: httpx.AsyncClient, size: tuple[int, int]
) -> None:
    content = png(1, size)
    assert (await drawn(client, content)).size == size
    assert (await drawn(client, content, size=80)).size == tuple(
        round(side * 80 / max(size)) for side in size
    )


async def test_a_large_picture_is_drawn_at_most_1024_pixels_long(client: httpx.AsyncClient) -> None:
    content = png(1, (1200, 60))
    assert (await drawn(client, content)).size == (1024, 51)
    assert (await drawn(client, content, size=1200)).size == (1200, 60)


async def test_no_overlay_gives_the_picture_back(client: httpx.AsyncClient) -> None:
    picture = await drawn(client, png(1, (40, 24)), overlay=0)
    assert np.array_equal(np.asarray(picture), np.asarray(noise(1, (40, 24))))


@pytest.mark.parametrize("colormap", COLORMAPS)
async def test_full_overlay_shows_the_colormaps_strongest_colour(
    client: httpx.AsyncClient, colormap: str
) -> None:
    import matplotlib

    picture = await drawn(client, encoded(plain(RED)), overlay=1, colormap=colormap)
    strongest = np.array(matplotlib.colormaps[colormap](1.0)[:3]) * 255
    assert np.abs(np.asarray(picture) - strongest).max() <= 1.0  # one colour: even attention


async def test_threshold_darkens_what_is_outside(client: httpx.AsyncClient) -> None:
    content = encoded(Image.linear_gradient("L").resize((32, 32)))
    picture = await drawn(client, content, threshold=0.5, overlay=1, head=0)
    dark = (np.asarray(picture) == 0).all(axis=2)
    assert dark[:8].all()  # the dark end has little attention in head 0
    assert not dark[-8:].any()
    whole = await drawn(client, content, threshold=1, overlay=1, head=0)
    assert not (np.asarray(whole) == 0).all(axis=2).any()


async def test_heads_are_drawn_one_by_one_and_as_a_grid(client: httpx.AsyncClient) -> None:
    content = png(1, (40, 24))
    first, second = [np.asarray(await drawn(client, content, head=head)) for head in (0, 1)]
    assert not np.array_equal(first, second)
    sheet = np.asarray(await drawn(client, content, head="all"))
    assert sheet.shape == (24, 40 + 4 + 40, 3)
    for found, alone in ((sheet[:, :40], first), (sheet[:, 44:], second)):
        differs = (found != alone).any(axis=2)
        assert differs[:12, :9].any()  # its number
        assert not differs[14:].any()
        assert not differs[:, 12:].any()


async def test_raw_maps_are_the_encoders(client: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    content = png(1, (40, 24))
    task = AttentionTask(block=1)
    maps = encoder.run(task, [encoder.prepare(task, noise(1, (40, 24)))])[0]
    for head, names, values in (
        ("all", [0, 1], maps),
        ("1", [1], maps[1:]),
        ("mean", ["mean"], maps.mean(axis=0, keepdims=True)),
        ("max", ["max"], maps.max(axis=0, keepdims=True)),
    ):
        response = await client.post(URL, content=content, headers=WANT_JSON, params={"head": head})
        answer = json_of(response)
        assert answer["model"] == "fake"
        assert answer["grid"] == [6, 10]
        assert answer["heads"] == names
        assert np.allclose(answer["maps"], values)


async def test_options_stand_beside_the_picture_in_json(client: httpx.AsyncClient) -> None:
    content = png(1, (40, 24))
    by_query = await drawn(client, content, head=1, colormap="magma", overlay=0.3, size=64)
    body = {"image": data_uri(content), "colormap": "magma", "overlay": 0.3, "size": 64}
    for head in (1, "1"):
        response = await client.post(URL, json={**body, "head": head})
        assert response.status_code == 200, response.text
        assert np.array_equal(np.asarray(opened(response.content)), np.asarray(by_query))
    response = await client.post(
        URL, files={"image": ("a.png", content)}, params={**body, "head": 1, "image": None}
    )
    assert error_of(response, 422)["param"] == "image"


@pytest.mark.parametrize("head", ["2", "999"])
async def test_a_head_that_the_model_does_not_have(client: httpx.AsyncClient, head: str) -> None:
    response = await client.post(URL, content=png(1), headers=RAW, params={"head": head})
    error = error_of(response, 400, "invalid_head")
    assert error["param"] == "head"
    assert "0 to 1" in error["message"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("head", "-1"),
        ("head", "first"),
        ("head", "1.5"),
        ("threshold", "0"),
        ("threshold", "1.1"),
        ("threshold", "nan"),
        ("colormap", "rainbow"),
        ("overlay", "-0.1"),
        ("overlay", "1.1"),
        ("size", "15"),
        ("size", "4097"),
        ("heads", "1"),
    ],
)
async def test_options_that_cannot_be_are_named(
    client: httpx.AsyncClient, option: str, value: str
) -> None:
    response = await client.post(URL, content=png(1), headers=RAW, params={option: value})
    error = error_of(response, 422, "invalid_parameter")
    assert error["param"] == option
    assert option in error["message"]
    response = await client.post(URL, json={"image": data_uri(png(1)), option: value})
    assert error_of(response, 422, "invalid_parameter")["param"] == option


async def test_one_picture_alone(client: httpx.AsyncClient) -> None:
    for count in (2, 3, 5):
        response = await client.post(URL, files=[("image", ("a.png", png(1)))] * count)
        assert error_of(response, 400, "too_many_images")["param"] == "image"
    error_of(await client.post(URL, json={}), 422)
    response = await client.post(URL, json={"image": [data_uri(png(1))]})
    assert error_of(response, 422)["param"] == "image"
