"""What /v1/attention can be asked for beside the mean of the last block."""

import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.encoder import AttentionTask, Task, TokensTask
from service.patch_maps import principal_components, similarity
from tests.service.answers import error_of, json_of
from tests.service.fakes import FakeEncoder
from tests.service.pictures import data_uri, noise, opened, png

pytestmark = pytest.mark.anyio
URL = "/v1/attention"
RAW = {"Content-Type": "image/png"}
SIZE = (40, 24)


@pytest.fixture
def encoder(shared_encoder: FakeEncoder) -> FakeEncoder:
    shared_encoder.calls.clear()
    return shared_encoder


@pytest.fixture
def client(shared_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return shared_client


def result(encoder: FakeEncoder, task: Task) -> np.ndarray:
    return encoder.run(task, [encoder.prepare(task, noise(1, SIZE))])[0]


async def ask(client: httpx.AsyncClient, accept: str = "*/*", **options: Any) -> httpx.Response:
    headers = {**RAW, "Accept": accept}
    return await client.post(URL, content=png(1, SIZE), headers=headers, params=options)


async def numbers(client: httpx.AsyncClient, **options: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json_of(await ask(client, format="json", **options))
    return answer


@pytest.mark.parametrize(
    ("options", "task", "block"),
    [
        ({}, AttentionTask(block=1), 1),
        ({"block": 0}, AttentionTask(block=0), 0),
        ({"block": 1}, AttentionTask(block=1), 1),
        ({"block": -1}, AttentionTask(block=1), 1),
        ({"block": -2}, AttentionTask(block=0), 0),
        ({"point": "0.9,0.1"}, AttentionTask(block=1, point=(0.9, 0.1)), 1),
        ({"point": "0, 1", "block": 0}, AttentionTask(block=0, point=(0.0, 1.0)), 0),
        ({"resolution": 34}, AttentionTask(block=1, resolution=32), 1),  # whole patches
        ({"resolution": 1}, AttentionTask(block=1, resolution=4), 1),
        ({"rollout": "true"}, AttentionTask(block=None), None),
        ({"rollout": "true", "point": ".5,1.0"}, AttentionTask(block=None, point=(0.5, 1.0)), None),
        ({"rollout": "true", "head": "mean"}, AttentionTask(block=None), None),
    ],
)
async def test_block_point_and_rollout(
    client: httpx.AsyncClient,
    encoder: FakeEncoder,
    options: dict[str, Any],
    task: AttentionTask,
    block: int | None,
) -> None:
    answer = await numbers(client, **options)
    assert encoder.calls == [(task, 1)]
    assert (answer["view"], answer["block"], answer["grid"]) == ("attention", block, [6, 10])
    assert answer["heads"] == (["mean"] if block is not None else ["rollout"])
    expected = result(encoder, task).mean(axis=0, keepdims=True)
    assert np.allclose(answer["maps"], expected)


async def test_a_point_in_json_may_be_a_list(client: httpx.AsyncClient) -> None:
    body = {"image": data_uri(png(1, SIZE)), "format": "json"}
    answers = [
        json_of(await client.post(URL, json={**body, "point": point}))
        for point in ("0.25,1", [0.25, 1], [0.25, 1.0], [0.25, 1.0 - 1e-9])
    ]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    tiny = [json_of(await client.post(URL, json={**body, "point": p})) for p in ("0,0", [1e-5, 0])]
    assert tiny[0] == tiny[1]
    assert answers[0] != json_of(await client.post(URL, json=body))


async def test_components_of_the_tokens(client: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    answer = await numbers(client, view="pca")
    assert encoder.calls == [(TokensTask(), 1)]
    expected = principal_components(result(encoder, TokensTask()))
    assert np.allclose(answer["maps"], expected, atol=1e-6)
    assert (answer["view"], answer["block"], answer["heads"]) == ("pca", None, [0, 1, 2])


async def test_components_are_colours(client: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    first = await ask(client, view="pca", overlay=1)
    again = await ask(client, view="pca", overlay=1)
    assert first.content == again.content
    pixels = np.asarray(opened(first.content)).astype(float)
    assert pixels.shape == (SIZE[1], SIZE[0], 3)
    components = principal_components(result(encoder, TokensTask()))
    for channel, one in zip(pixels.transpose(2, 0, 1), components, strict=True):
        low, high = one.min(), one.max()
        patches = np.asarray(
            Image.fromarray(channel.astype(np.float32)).resize((10, 6), Image.Resampling.BOX)
        )
        assert np.corrcoef(patches.ravel(), one.ravel())[0, 1] > 0.95
        assert channel[np.unravel_index(one.argmax(), one.shape)[0] * 4 + 1].max() > 200
        assert high > low


async def test_similarity_to_a_patch(client: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    answer = await numbers(client, view="similarity", point="0.95,0.05")
    assert encoder.calls == [(TokensTask(), 1)]
    expected = similarity(result(encoder, TokensTask()), (0.95, 0.05))
    assert np.allclose(answer["maps"], expected, atol=1e-6)
    assert answer["maps"][0][0][9] == pytest.approx(1.0)
    assert answer["heads"] == ["similarity"]
    drawn = await ask(client, view="similarity", point="0.95,0.05", overlay=1, colormap="gray")
    pixels = np.asarray(opened(drawn.content))
    assert pixels[0, -1].tolist() == [255, 255, 255]
    assert pixels.min() == 0  # what is least like it


@pytest.mark.parametrize(
    ("asked", "kind", "format"),
    [
        ({"format": "png"}, "image/png", "PNG"),
        ({"format": "webp"}, "image/webp", "WEBP"),
        ({"accept": "image/webp"}, "image/webp", "WEBP"),
        ({"accept": "application/json", "format": "webp"}, "image/webp", "WEBP"),
        ({"accept": "text/html"}, "image/png", "PNG"),
    ],
)
async def test_png_and_webp(
    client: httpx.AsyncClient,
    asked: dict[str, str],
    kind: str,
    format: str,  # noqa: A002
) -> None:
    response = await ask(client, **asked)
    assert response.headers["content-type"] == kind
    picture = opened(response.content)
    assert (picture.format, picture.size) == (format, SIZE)
    drawn = np.asarray(opened((await ask(client)).content)).astype(float)
    assert np.abs(np.asarray(picture.convert("RGB")) - drawn).mean() < 6.0


@pytest.mark.parametrize("accept", ["application/x-npy", "application/octet-stream"])
async def test_raw_arrays(client: httpx.AsyncClient, encoder: FakeEncoder, accept: str) -> None:
    for options, count in (
        ({"head": "all"}, 2),
        ({"head": "max"}, 1),
        ({"view": "pca"}, 3),
        ({"rollout": "true"}, 1),
    ):
        response = await ask(client, accept=accept, **options)
        assert response.headers["content-type"] == accept
        array = np.load(io.BytesIO(response.content), allow_pickle=False)
        assert (array.shape, array.dtype) == ((count, 6, 10), np.dtype("<f4"))
        told = (await numbers(client, **options))["maps"]
        assert np.array_equal(array, np.float32(told))
    by_name = await ask(client, format="npy")
    assert by_name.headers["content-type"] == "application/x-npy"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"view": "pca", "head": "0"}, "head"),
        ({"view": "pca", "block": 0}, "block"),
        ({"view": "pca", "rollout": "true"}, "rollout"),
        ({"view": "pca", "point": "0,0"}, "point"),
        ({"view": "pca", "threshold": 0.5}, "threshold"),
        ({"view": "pca", "colormap": "jet"}, "colormap"),
        ({"view": "similarity", "point": "0,0", "head": "all"}, "head"),
        ({"view": "similarity", "point": "0,0", "block": 1}, "block"),
        ({"view": "similarity", "point": "0,0", "rollout": "true"}, "rollout"),
        ({"view": "similarity", "point": "0,0", "threshold": 0.5}, "threshold"),
        ({"rollout": "true", "head": "1"}, "head"),
        ({"rollout": "true", "head": "max"}, "head"),
        ({"rollout": "true", "block": -1}, "block"),
    ],
)
async def test_what_cannot_go_together_is_named(
    client: httpx.AsyncClient, encoder: FakeEncoder, options: dict[str, Any], param: str
) -> None:
    error = error_of(await ask(client, **options), 400, "incompatible_options")
    assert error["param"] == param
    other = f"view={options['view']}" if "view" in options else "rollout"
    assert error["message"].startswith(param)
    assert other in error["message"]
    assert not encoder.calls


@pytest.mark.parametrize("view", ["attention", "pca"])
async def test_more_pixels_than_the_model_may_see(
    client: httpx.AsyncClient, encoder: FakeEncoder, view: str
) -> None:
    error = error_of(await ask(client, view=view, resolution=35), 400, "invalid_resolution")
    assert error["param"] == "resolution"
    assert "at most 34" in error["message"]
    assert not encoder.calls


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("point", "2,0.3", "two numbers from 0 to 1"),
        ("point", "0.5", "two numbers from 0 to 1"),
        ("head", "left", "mean, max, all, or the number of a head"),
    ],
)
async def test_what_an_option_may_be_is_told_in_words(
    client: httpx.AsyncClient, option: str, value: str, rule: str
) -> None:
    error = error_of(await ask(client, **{option: value}), 422, "invalid_parameter")
    assert error["param"] == option
    assert rule in error["message"]
    assert value in error["message"]
    assert "^" not in error["message"]


async def test_similarity_needs_a_point(client: httpx.AsyncClient) -> None:
    error = error_of(await ask(client, view="similarity"), 400, "missing_point")
    assert error["param"] == "point"


@pytest.mark.parametrize("block", ["2", "-3", "999"])
async def test_a_block_that_the_model_does_not_have(client: httpx.AsyncClient, block: str) -> None:
    error = error_of(await ask(client, block=block), 400, "invalid_block")
    assert error["param"] == "block"
    assert "0 to 1" in error["message"]
    assert "-2" in error["message"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("block", "last"),
        ("block", "1.5"),
        ("block", "10000"),
        ("point", "1"),
        ("point", "0.5,1.1"),
        ("point", "-0.1,0"),
        ("point", "nan,0"),
        ("point", "1e-3,0"),
        ("point", "0.5,0.5,0.5"),
        ("point", "a,b"),
        ("point", ""),
        ("rollout", "perhaps"),
        ("view", "depth"),
        ("format", "gif"),
        ("head", "min"),
    ],
)
async def test_options_that_cannot_be_are_named(
    client: httpx.AsyncClient, option: str, value: str
) -> None:
    error = error_of(await ask(client, **{option: value}), 422, "invalid_parameter")
    assert error["param"] == option
    body = {"image": data_uri(png(1)), option: value}
    assert error_of(await client.post(URL, json=body), 422)["param"] == option


@pytest.mark.parametrize(
    "point", [[0.5], [0.5, 0.5, 0.5], [2, 0], ["a", "b"], {"x": 0}, 0.5, [[0, 0]]]
)
async def test_points_in_json_that_are_none(client: httpx.AsyncClient, point: Any) -> None:
    body = {"image": data_uri(png(1)), "point": point}
    error = error_of(await client.post(URL, json=body), 422, "invalid_parameter")
    assert error["param"] == "point"
