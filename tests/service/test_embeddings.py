import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from service.routes.embeddings import as_json
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import as_base64, data_uri, encoded, noise, png

pytestmark = pytest.mark.anyio
URL = "/v1/embeddings"


@pytest.fixture
def encoder(shared_encoder: FakeEncoder) -> FakeEncoder:
    shared_encoder.calls.clear()
    return shared_encoder


@pytest.fixture
def client(shared_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return shared_client


def vectors_of(answer: dict[str, Any]) -> np.ndarray:
    return np.array([one["embedding"] for one in answer["data"]])


def expected(encoder: FakeEncoder, seed: int, task: Any = "cls") -> np.ndarray:
    return encoder.run(task, [encoder.prepare(task, noise(seed))])[0]


async def test_one_data_uri_in_openais_shape(client: httpx.AsyncClient) -> None:
    answer = json_of(await client.post(URL, json={"input": data_uri(png(1)), "model": "fake"}))
    assert answer["object"] == "list"
    assert answer["model"] == "fake"
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    (one,) = answer["data"]
    assert (one["object"], one["index"], len(one["embedding"])) == ("embedding", 0, 48)
    assert np.linalg.norm(one["embedding"]) == pytest.approx(1.0, abs=1e-6)


async def test_a_list_keeps_its_order(client: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    body = {"input": [data_uri(png(2)), as_base64(png(1)), data_uri(png(3))], "normalize": False}
    answer = json_of(await client.post(URL, json=body))
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    assert np.allclose(vectors_of(answer), [expected(encoder, seed) for seed in (2, 1, 3)])


async def test_base64_with_line_breaks(client: httpx.AsyncClient) -> None:
    broken = base64.encodebytes(png(1)).decode()
    assert "\n" in broken.strip()
    answers = [
        json_of(await client.post(URL, json={"input": text})) for text in (broken, data_uri(png(1)))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("given", ["float", None])
async def test_floats_and_base64_are_the_same_numbers(
    client: httpx.AsyncClient, given: str | None
) -> None:
    body = {"input": [data_uri(png(1)), data_uri(png(2))]}
    floats = json_of(await client.post(URL, json={**body, "encoding_format": given}))
    packed = json_of(await client.post(URL, json={**body, "encoding_format": "base64"}))
    decoded = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in packed["data"]]
    assert np.array_equal(vectors_of(floats).astype(np.float32), decoded)


def test_numbers_are_the_shortest_that_are_the_same_float32() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    found = json.loads(as_json({"each": values, "grid": (2, 3), "none": None}))
    assert (found["grid"], found["none"]) == ([2, 3], None)
    for value, told in zip(values, found["each"], strict=True):
        if np.isfinite(value):
            assert np.float32(told) == value
        else:
            assert told is None
    assert as_json({"each": np.float32([0.1, 1 / 3])}) == b'{"each":[0.1,0.33333334]}'


@pytest.mark.parametrize(("normalize", "unit"), [(True, True), (False, False)])
async def test_normalize(
    client: httpx.AsyncClient, encoder: FakeEncoder, normalize: bool, unit: bool
) -> None:
    body = {"input": data_uri(png(1)), "normalize": normalize}
    (vector,) = vectors_of(json_of(await client.post(URL, json=body)))
    raw = expected(encoder, 1)
    assert np.allclose(vector, raw / np.linalg.norm(raw) if unit else raw, atol=1e-6)


async def test_the_copy_descriptor_is_another_vector(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    body = {"input": data_uri(png(1)), "feature": "copy", "normalize": False}
    (vector,) = vectors_of(json_of(await client.post(URL, json=body)))
    assert np.allclose(vector, expected(encoder, 1, "copy"))
    assert encoder.calls[0] == ("copy", 1)


@pytest.mark.parametrize(
    ("feature", "right", "wrong"),
    [("cls", 48, 32), ("cls", 48, 96), ("copy", 96, 48), ("last4", 192, 48), ("cls+mean", 51, 48)],
)
async def test_dimensions_must_be_the_features_own(
    client: httpx.AsyncClient, feature: str, right: int, wrong: int
) -> None:
    body = {"input": data_uri(png(1)), "feature": feature}
    answer = json_of(await client.post(URL, json={**body, "dimensions": right}))
    assert vectors_of(answer).shape == (1, right)
    error = error_of(
        await client.post(URL, json={**body, "dimensions": wrong}), 400, "invalid_dimensions"
    )
    assert error["param"] == "dimensions"
    assert str(wrong) in error["message"]
    assert str(right) in error["message"]


async def test_another_model_is_not_found(client: httpx.AsyncClient) -> None:
    body = {"input": data_uri(png(1)), "model": "clip"}
    error = error_of(await client.post(URL, json=body), 404, "model_not_found")
    assert error["param"] == "model"
    assert "'fake'" in error["message"]
    raw = await client.post(
        URL, params={"model": "clip"}, content=png(1), headers={"Content-Type": "image/png"}
    )
    error_of(raw, 404, "model_not_found")


async def test_multipart_one_and_several(client: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    one = json_of(await client.post(URL, files={"image": ("a.png", png(1))}))
    files = [("image", (f"{seed}.png", png(seed))) for seed in (3, 1, 2)]
    several = json_of(await client.post(URL, files=files, params={"normalize": "false"}))
    assert len(one["data"]) == 1
    assert np.allclose(vectors_of(several), [expected(encoder, seed) for seed in (3, 1, 2)])


@pytest.mark.parametrize("kind", ["image/jpeg", "image/png; q=1", "application/octet-stream"])
async def test_a_raw_body(client: httpx.AsyncClient, kind: str) -> None:
    content = encoded(noise(1), "JPEG")
    answer = json_of(
        await client.post(
            URL,
            content=content,
            headers={"Content-Type": kind},
            params={"encoding_format": "base64"},
        )
    )
    as_json = {"input": data_uri(content), "encoding_format": "base64"}
    assert answer == json_of(await client.post(URL, json=as_json))


async def test_a_bad_picture_names_its_place(client: httpx.AsyncClient) -> None:
    good, bad = png(1), b"no picture"
    values = [data_uri(good), data_uri(good), data_uri(bad), data_uri(bad)]
    error = error_of(await client.post(URL, json={"input": values}), 415, "unsupported_image")
    assert error["param"] == "input[2]"
    assert "input[2]" in error["message"]
    files = [("image", ("a.png", good)), ("image", ("b.png", bad))]
    error = error_of(await client.post(URL, files=files), 415)
    assert error["param"] == "image[1]"


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("https://example.com/cat.jpg", "url_fetching_off"),
        ("data:image/png,abc", "invalid_data_uri"),
        ("data:image/png;base64", "invalid_data_uri"),
        ("no base64!", "invalid_base64"),
        ("data:image/png;base64,a", "invalid_base64"),
        ("\u00e4\u00f6", "invalid_base64"),
        ("", "invalid_image"),
    ],
)
async def test_text_that_is_no_picture(client: httpx.AsyncClient, value: str, code: str) -> None:
    error = error_of(await client.post(URL, json={"input": [value]}), 400, code)
    assert error["param"] == "input[0]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": [1, 2]}, "input[0]"),
        ({"input": ["x", {"image": "y"}]}, "input[1]"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": "many"}, "dimensions"),
        ({"input": "x", "feature": "gem"}, "feature"),
        ({"input": "x", "modle": "fake"}, "modle"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    error = error_of(await client.post(URL, json=body), 422, "invalid_parameter")
    assert error["param"] == param
    assert error["message"].startswith(param)


async def test_an_unknown_option_in_the_query_is_named(client: httpx.AsyncClient) -> None:
    response = await client.post(
        URL, params={"dimension": 3}, content=png(1), headers={"Content-Type": "image/png"}
    )
    assert error_of(response, 422)["param"] == "dimension"


async def test_no_picture_and_too_many(serve: Serve) -> None:
    async with serve(max_request_images=2) as client:
        error = error_of(await client.post(URL, json={"input": []}), 400, "missing_image")
        assert error["param"] == "input"
        error = error_of(await client.post(URL, json={"input": ["a"] * 3}), 413, "too_many_images")
        assert "2" in error["message"]
        for count in (3, 4, 9):
            files = [("image", ("a.png", png(1)))] * count
            error = error_of(await client.post(URL, files=files), 413, "too_many_images")
            assert error["param"] == "image"
            assert "2" in error["message"]
        json_of(await client.post(URL, files=[("image", ("a.png", png(1)))] * 2))


async def test_form_fields_that_mean_nothing_here_are_refused(client: httpx.AsyncClient) -> None:
    for field in ("id", "metadata", "normalize", "picture"):
        response = await client.post(URL, files={"image": ("a.png", png(1))}, data={field: "1"})
        assert error_of(response, 400, "unknown_field")["param"] == field
    response = await client.post(URL, files={"picture": ("a.png", png(1))})
    assert error_of(response, 400, "unknown_field")["param"] == "picture"


async def test_the_model_list(client: httpx.AsyncClient) -> None:
    answer = json_of(await client.get("/v1/models"))
    assert answer["object"] == "list"
    (card,) = answer["data"]
    assert card["id"] == "fake"
    assert card["object"] == "model"
    assert (card["embedding_size"], card["input_size"], card["patch_size"]) == (48, 16, 4)
    assert card["licence"] == "CC0-1.0"
