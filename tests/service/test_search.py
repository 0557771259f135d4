import json
import math
from typing import Any

import httpx
import numpy as np
import pytest

from index.collection import Match
from service.routes.search import vote
from tests.service.answers import error_of, json_of
from tests.service.fakes import FakeEncoder
from tests.service.pictures import BLUE, GREEN, RED, data_uri, encoded, plain

pytestmark = pytest.mark.anyio
URL = "/v1/collections/default"
REDDISH = (190, 60, 30)
PICTURES = {
    "red": plain(RED),
    "reddish": plain(REDDISH),
    "green": plain(GREEN),
    "blue": plain(BLUE),
}
LABELS: dict[str, Any] = {"red": "warm", "reddish": "warm", "green": "cold"}


@pytest.fixture
async def filled(client: httpx.AsyncClient, encoder: FakeEncoder) -> httpx.AsyncClient:
    files = [("image", (name, encoded(picture))) for name, picture in PICTURES.items()]
    metadata = [json.dumps({"label": LABELS[n]} if n in LABELS else {}) for n in PICTURES]
    data = {"id": list(PICTURES), "metadata": metadata}
    json_of(await client.post(f"{URL}/images", files=files, data=data))
    encoder.calls.clear()
    return client


def vector(encoder: FakeEncoder, name: str, task: Any = "cls") -> np.ndarray:
    return encoder.run(task, [encoder.prepare(task, PICTURES[name])])[0]


def cosine(encoder: FakeEncoder, one: str, other: str, task: Any = "cls") -> float:
    a, b = (vector(encoder, name, task).astype(np.float64) for name in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


async def found(client: httpx.AsyncClient, **request: Any) -> list[dict[str, Any]]:
    matches: list[dict[str, Any]] = json_of(await client.post(f"{URL}/search", **request))[
        "matches"
    ]
    return matches


async def test_by_picture_in_every_way(filled: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    content = encoded(PICTURES["red"])
    for request in (
        {"files": {"image": ("a.png", content)}},
        {"content": content, "headers": {"Content-Type": "image/png"}},
        {"json": {"image": data_uri(content)}},
    ):
        matches = await found(filled, **request)
        assert [match["id"] for match in matches][:2] == ["red", "reddish"]
        assert len(matches) == 4
        assert matches[0]["metadata"] == {"label": "warm"}
        for match in matches:
            assert set(match) == {"id", "score", "metadata"}
            assert match["score"] == pytest.approx(cosine(encoder, "red", match["id"]), abs=1e-5)
        scores = [match["score"] for match in matches]
        assert scores == sorted(scores, reverse=True)


async def test_by_id_leaves_itself_out(filled: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    matches = await found(filled, json={"id": "reddish", "k": 3})
    assert matches[0]["id"] == "red"
    assert sorted(match["id"] for match in matches) == ["blue", "green", "red"]
    assert encoder.calls == []  # its vector is known


async def test_by_vector(filled: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    query = [float(x) * 7.5 for x in vector(encoder, "green")]
    matches = await found(filled, json={"vector": query, "k": 1})
    assert [match["id"] for match in matches] == ["green"]
    assert matches[0]["score"] == pytest.approx(1.0, abs=1e-5)


async def test_k_and_min_score(filled: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    content = encoded(PICTURES["red"])
    raw = {"content": content, "headers": {"Content-Type": "image/png"}}
    assert len(await found(filled, **raw, params={"k": 2})) == 2
    assert len(await found(filled, json={"image": data_uri(content), "k": 3})) == 3
    least = (cosine(encoder, "red", "reddish") + cosine(encoder, "red", "green")) / 2
    for request in (
        {**raw, "params": {"min_score": least}},
        {"json": {"image": data_uri(content), "min_score": least}},
    ):
        assert [match["id"] for match in await found(filled, **request)] == ["red", "reddish"]


async def test_an_empty_collection_has_no_matches(client: httpx.AsyncClient) -> None:
    picture = {"image": ("a.png", encoded(PICTURES["red"]))}
    assert await found(client, files=picture) == []
    answer = json_of(await client.post(f"{URL}/classify", files=picture, params={"label": "label"}))
    assert answer == {"labels": [], "neighbours": []}
    answer = json_of(await client.post(f"{URL}/copies", files=picture))
    assert answer == {"calibrated": False, "threshold": None, "matches": []}


@pytest.mark.parametrize(
    "body", [{}, {"k": 3}, {"id": "red", "vector": [1.0] * 48}, {"image": "x", "id": "red"}]
)
async def test_exactly_one_query(filled: httpx.AsyncClient, body: dict[str, Any]) -> None:
    message = error_of(await filled.post(f"{URL}/search", json=body), 400)["message"]
    assert "exactly one of image, id, vector" in message


async def test_queries_that_cannot_be(filled: httpx.AsyncClient) -> None:
    async def ask(**body: Any) -> httpx.Response:
        content = json.dumps(body)  # unlike httpx, Python's json writes NaN
        kind = {"Content-Type": "application/json"}
        return await filled.post(f"{URL}/search", content=content, headers=kind)

    message = error_of(await ask(vector=[1.0, 2.0]), 400, "invalid_vector")["message"]
    assert "[48]" in message
    assert "[2]" in message
    for wrong in ([0.0] * 48, [math.nan] * 48, [1e39] * 48, []):
        error_of(await ask(vector=wrong), 400, "invalid_vector")
    assert error_of(await ask(vector=["a"] * 48), 422)["param"] == "vector[0]"
    assert "'grey'" in error_of(await ask(id="grey"), 404, "image_not_found")["message"]
    for option, value in (("k", 0), ("k", 1001), ("k", 1.5), ("min_score", 1.5), ("where", {})):
        error = error_of(await ask(id="red", **{option: value}), 422, "invalid_parameter")
        assert error["param"] == option
    error = error_of(await ask(image="https://example.com/a.png"), 400, "url_fetching_off")
    assert error["param"] == "image"


async def test_the_vote_over_http(filled: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    content = encoded(PICTURES["reddish"])
    # Of the four neighbours blue has no label; the others vote with exp(cosine / .5).
    weights = {n: math.exp(cosine(encoder, "reddish", n) / 0.5) for n in LABELS}
    warm = (weights["red"] + weights["reddish"]) / sum(weights.values())
    for request in (
        {"json": {"image": data_uri(content), "label": "label", "temperature": 0.5}},
        {
            "files": {"image": ("a.png", content)},
            "params": {"label": "label", "temperature": 0.5},
        },
    ):
        answer = json_of(await filled.post(f"{URL}/classify", **request))
        assert [one["label"] for one in answer["labels"]] == ["warm", "cold"]
        shares = [one["probability"] for one in answer["labels"]]
        assert shares == pytest.approx([warm, 1 - warm], abs=1e-5)
        assert [one["id"] for one in answer["neighbours"]][:2] == ["reddish", "red"]
        assert len(answer["neighbours"]) == 4
    one = await filled.post(
        f"{URL}/classify", files={"image": ("a.png", content)}, params={"label": "label", "k": 1}
    )
    assert json_of(one)["labels"] == [{"label": "warm", "probability": 1.0}]


async def test_classify_needs_a_label(filled: httpx.AsyncClient) -> None:
    content = encoded(PICTURES["red"])
    files = {"image": ("a.png", content)}
    body = {"image": data_uri(content)}
    for request in ({"files": files}, {"json": body}):
        response = await filled.post(f"{URL}/classify", **request)
        assert error_of(response, 400, "missing_label")["param"] == "label"
    for option, value in (("temperature", 0), ("temperature", "nan"), ("k", 0), ("label", "")):
        response = await filled.post(
            f"{URL}/classify", files=files, params={"label": "x", option: value}
        )
        assert error_of(response, 422)["param"] == option


def match_of(key: str, score: float, metadata: dict[str, Any]) -> Match:
    return Match(key, score, json.dumps(metadata))


def test_the_votes_numbers() -> None:
    neighbours = [
        match_of("a", 0.9, {"y": "cat"}),
        match_of("b", 0.8, {"y": "dog"}),
        match_of("c", 0.7, {"y": "dog"}),
        match_of("d", 0.6, {}),
    ]
    # exp(9), exp(8), exp(7): 8103.084, 2980.958, 1096.633; together 12180.675.
    answer = [(one.label, one.probability) for one in vote(neighbours, "y", 0.1)]
    assert [label for label, _ in answer] == ["cat", "dog"]
    assert [share for _, share in answer] == pytest.approx([0.665241, 0.334759], abs=1e-6)


def test_labels_may_be_any_json_value() -> None:
    labels: list[Any] = ["1", 1, True, None, ["a", 1], {"b": 1, "a": 2}]
    neighbours = [match_of(str(i), 0.9 - i / 10, {"y": label}) for i, label in enumerate(labels)]
    answer = vote(neighbours, "y", 1.0)
    assert [json.dumps(one.label) for one in answer] == [
        json.dumps(label, sort_keys=True) for label in labels
    ]
    assert sum(one.probability for one in answer) == pytest.approx(1.0)


def test_a_small_temperature_neither_overflows_nor_leaves_nobody_to_vote() -> None:
    neighbours = [
        match_of("a", 1.0, {}),  # the nearest has no label
        match_of("b", -0.5, {"y": "cat"}),
        match_of("c", -0.6, {"y": "dog"}),
    ]
    for temperature in (1e-3, 1e-6, 1e-300, 5e-324):
        answer = [(one.label, one.probability) for one in vote(neighbours, "y", temperature)]
        assert answer[0] == ("cat", pytest.approx(1.0))


async def test_copies_have_scores_and_no_verdict(
    filled: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    content = encoded(PICTURES["green"])
    for request in (
        {"files": {"image": ("a.png", content)}, "params": {"k": 3}},
        {"json": {"image": data_uri(content), "k": 3}},
    ):
        answer = json_of(await filled.post(f"{URL}/copies", **request))
        assert answer["calibrated"] is False
        assert answer["threshold"] is None
        assert answer["matches"][0]["id"] == "green"
        scores = [match["score"] for match in answer["matches"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        for match in answer["matches"]:
            expected = cosine(encoder, "green", match["id"], "copy")
            assert match == {
                "id": match["id"],
                "score": pytest.approx(expected, abs=1e-5),
                "normalized_score": None,
                "is_copy": None,
            }
    assert {task for task, _ in encoder.calls} == {"copy"}
