"""What embeddings can be asked for beside CLS, and in which forms they are given."""

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest

from service.encoder import FEATURES
from tests.service.answers import error_of, json_of
from tests.service.fakes import FakeEncoder
from tests.service.pictures import data_uri, noise, png

pytestmark = pytest.mark.anyio
URL = "/v1/embeddings"
NPY = ["application/x-npy", "application/octet-stream"]


@pytest.fixture
def encoder(shared_encoder: FakeEncoder) -> FakeEncoder:
    shared_encoder.calls.clear()
    return shared_encoder


@pytest.fixture
def client(shared_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return shared_client


def expected(encoder: FakeEncoder, seed: int, feature: Any) -> np.ndarray:
    return encoder.run(feature, [encoder.prepare(feature, noise(seed))])[0]


async def as_npy(client: httpx.AsyncClient, kind: str = NPY[0], **body: Any) -> np.ndarray:
    response = await client.post(URL, json=body, headers={"Accept": kind})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == kind
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert array.dtype == np.dtype("<f4")
    return np.asarray(array)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("normalize", [True, False])
async def test_each_form_holds_the_same_numbers(
    client: httpx.AsyncClient, encoder: FakeEncoder, feature: str, normalize: bool
) -> None:
    seeds = (1, 2, 3)
    raw = np.stack([expected(encoder, seed, feature) for seed in seeds])
    lengths = np.linalg.norm(raw, axis=-1, keepdims=True)
    right = raw / lengths if normalize else raw
    encoder.calls.clear()
    body = {
        "input": [data_uri(png(seed)) for seed in seeds],
        "feature": feature,
        "normalize": normalize,
    }
    floats = json_of(await client.post(URL, json=body))
    assert encoder.calls
    assert {task for task, _ in encoder.calls} == {feature}
    assert sum(count for _, count in encoder.calls) == len(seeds)
    found = np.array([one["embedding"] for one in floats["data"]], dtype=np.float32)
    assert found.shape == right.shape
    assert np.allclose(found, right, atol=1e-6)
    packed = json_of(await client.post(URL, json={**body, "encoding_format": "base64"}))
    for one, values in zip(packed["data"], found, strict=True):
        decoded = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
        assert np.array_equal(decoded.reshape(values.shape), values)
    for kind in NPY:
        assert np.array_equal(await as_npy(client, kind, **body), found)
    for answer in (floats, packed):
        assert answer.get("grid") == ([4, 4] if feature == "patches" else None)
        assert ("grid" in answer) == (feature == "patches")


async def test_options_stand_in_the_query_beside_a_form(client: httpx.AsyncClient) -> None:
    files = [("image", (f"{seed}.png", png(seed))) for seed in (3, 1)]
    response = await client.post(
        URL,
        files=files,
        params={"feature": "last4", "dimensions": "192"},
        headers={"Accept": NPY[1]},
    )
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert array.shape == (2, 192)
    response = await client.post(URL, files=files, params={"dimensions": "192"})
    error = error_of(response, 400, "invalid_dimensions")
    assert "feature=cls" in error["message"]


async def test_a_large_answer_is_that_of_its_pictures(client: httpx.AsyncClient) -> None:
    body = {"input": [data_uri(png(1))] * 64, "feature": "last4", "normalize": False}
    answer = json_of(await client.post(URL, json=body))
    assert [one["index"] for one in answer["data"]] == list(range(64))
    one = json_of(await client.post(URL, json={**body, "input": body["input"][:1]}))
    assert answer["data"][63]["embedding"] == one["data"][0]["embedding"]


async def test_an_encoding_and_a_file_are_not_asked_for_together(client: httpx.AsyncClient) -> None:
    body = {"input": data_uri(png(1)), "encoding_format": "base64"}
    response = await client.post(URL, json=body, headers={"Accept": NPY[0]})
    error = error_of(response, 400, "incompatible_options")
    assert error["param"] == "encoding_format"
    assert NPY[0] in error["message"]
    answer = await client.post(URL, json={**body, "encoding_format": None})
    assert answer.status_code == 200


async def test_json_is_the_default_whatever_else_is_accepted(client: httpx.AsyncClient) -> None:
    for accept in ("*/*", "text/html", "application/json", "application/*", ""):
        response = await client.post(
            URL, json={"input": data_uri(png(1))}, headers={"Accept": accept}
        )
        assert response.headers["content-type"] == "application/json"
        json_of(response)


async def test_errors_are_json_whatever_is_accepted(client: httpx.AsyncClient) -> None:
    body = {"input": data_uri(b"no picture")}
    error_of(await client.post(URL, json=body, headers={"Accept": NPY[0]}), 415)


async def test_the_model_tells_its_features(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    (card,) = json_of(await client.get("/v1/models"))["data"]
    assert card["features"] == encoder.info.features
    assert card["blocks"] == 2
