"""Filters over HTTP; tests/index has what they mean."""

import json
from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder, created
from tests.service.pictures import data_uri, png

pytestmark = pytest.mark.anyio
URL = "/v1/collections/default"
COUNT = 24
RARE = {"must": {"key": "n", "match": {"any": [3, 11, 17]}}}
"""Lets three pictures through, none of which is near to any other."""
CATS = {"must": [{"key": "label", "match": {"value": "cat"}}]}
WRONG: list[tuple[Any, str]] = [
    (5, "filter: expected a filter"),
    ([], "filter: expected a filter"),
    ("cat", "filter: expected a filter"),
    ({"most": []}, "filter: unknown field 'most'"),
    ({"must": [{"key": "a"}]}, "filter.must[0]: expected exactly one of 'match'"),
    ({"must": {"key": "a", "range": {"ge": 1}}}, "filter.must.range: unknown field 'ge'"),
    ({"must": {"key": "\ud800", "exists": True}}, "filter.must.key: half of a surrogate"),
    ({"must": {"key": "a", "range": {"gt": float("nan")}}}, "filter.must.range.gt"),
]


def metadata(number: int) -> dict[str, Any]:
    return {"n": number, "label": "cat" if number % 2 else "dog"}


@pytest.fixture
async def filled(client: httpx.AsyncClient, encoder: FakeEncoder) -> httpx.AsyncClient:
    files = [("image", (f"{number}.png", png(number))) for number in range(COUNT)]
    data = {
        "id": [str(number) for number in range(COUNT)],
        "metadata": [json.dumps(metadata(number)) for number in range(COUNT)],
    }
    json_of(await client.post(f"{URL}/images", files=files, data=data))
    encoder.calls.clear()
    return client


async def ask(
    client: httpx.AsyncClient, route: str, chosen: Any, *, as_json: bool, **options: Any
) -> httpx.Response:
    """With the filter in a JSON body, or in the query string beside a raw picture."""
    if as_json:
        body = {"image": data_uri(png(1)), "filter": chosen, **options}
        return await client.post(
            f"{URL}/{route}",
            content=json.dumps(body),  # unlike httpx, Python's json writes NaN
            headers={"Content-Type": "application/json"},
        )
    return await client.post(
        f"{URL}/{route}",
        content=png(1),
        params={"filter": json.dumps(chosen), **options},
        headers={"Content-Type": "image/png"},
    )


@pytest.mark.parametrize("as_json", [True, False])
async def test_every_search_takes_one(filled: httpx.AsyncClient, as_json: bool) -> None:
    for route, key, options in (
        ("search", "matches", {}),
        ("copies", "matches", {}),
        ("classify", "neighbours", {"label": "label"}),
    ):
        answer = json_of(await ask(filled, route, RARE, as_json=as_json, k=3, **options))
        assert sorted(match["id"] for match in answer[key]) == ["11", "17", "3"]
        answer = json_of(await ask(filled, route, {}, as_json=as_json, k=1, **options))
        assert answer[key][0]["id"] == "1"  # nothing is asked for
        for chosen in (RARE, None):  # as if there were none
            answer = json_of(await ask(filled, route, chosen, as_json=as_json, k=1, **options))
            assert len(answer[key]) == 1


async def test_a_filter_that_lets_few_through_gives_k(filled: httpx.AsyncClient) -> None:
    chosen = {"must_not": {"key": "n", "range": {"lt": 20}}}
    matches = json_of(await ask(filled, "search", chosen, as_json=True, k=4))["matches"]
    assert sorted(match["id"] for match in matches) == ["20", "21", "22", "23"]
    everything = json_of(await ask(filled, "search", {}, as_json=True, k=COUNT))["matches"]
    assert matches == [match for match in everything if match["metadata"]["n"] >= 20]
    nearest = json_of(await ask(filled, "search", chosen, as_json=True, k=2))["matches"]
    assert nearest == matches[:2]


async def test_with_an_id_and_with_a_vector(
    filled: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    answer = json_of(await filled.post(f"{URL}/search", json={"id": "3", "filter": RARE}))
    assert sorted(match["id"] for match in answer["matches"]) == ["11", "17"]
    vector = [1.0] + [0.0] * 47
    answer = json_of(await filled.post(f"{URL}/search", json={"vector": vector, "filter": RARE}))
    assert len(answer["matches"]) == 3
    assert encoder.calls == []


async def test_only_those_that_pass_vote(filled: httpx.AsyncClient) -> None:
    answer = json_of(await ask(filled, "classify", CATS, as_json=False, label="label"))
    assert answer["labels"] == [{"label": "cat", "probability": pytest.approx(1.0)}]


async def test_listings_go_page_by_page(filled: httpx.AsyncClient) -> None:
    seen, query = [], {"filter": json.dumps(CATS), "limit": 5}
    while True:
        page = json_of(await filled.get(f"{URL}/images", params=query))
        seen += [image["id"] for image in page["images"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == [str(number) for number in range(1, COUNT, 2)]


async def test_numbers_of_any_size(filled: httpx.AsyncClient) -> None:
    for bound, count in ((10**400, 0), (-(10**400), COUNT), (22.5, 1)):
        chosen = {"must": {"key": "n", "range": {"gt": bound}}}
        page = await filled.get(f"{URL}/images", params={"filter": json.dumps(chosen)})
        assert len(json_of(page)["images"]) == count


@pytest.mark.parametrize(("chosen", "message"), WRONG)
async def test_mistakes_name_their_place(
    filled: httpx.AsyncClient, chosen: Any, message: str
) -> None:
    answers = [
        await ask(filled, route, chosen, as_json=as_json, **options)
        for route, options in (("search", {}), ("copies", {}), ("classify", {"label": "label"}))
        for as_json in (True, False)
    ]
    for method in ("GET", "DELETE"):
        params = {"filter": json.dumps(chosen)}
        answers.append(await filled.request(method, f"{URL}/images", params=params))
    for answer in answers:
        error = error_of(answer, 400, "invalid_filter")
        assert error["param"] == "filter"
        assert error["message"].startswith(message)
    assert json_of(await filled.get(URL))["count"] == COUNT


@pytest.mark.parametrize("text", ["", "{", "cat", "{'must': []}", "[" * 9000, "9" * 5000])
async def test_text_that_is_no_json(filled: httpx.AsyncClient, text: str) -> None:
    picture = {"files": {"image": ("a.png", png(1))}}
    for method, path, body in (
        ("POST", "search", picture),
        ("POST", "copies", picture),
        ("POST", "classify", picture),
        ("GET", "images", {}),
        ("DELETE", "images", {}),
    ):
        response = await filled.request(method, f"{URL}/{path}", params={"filter": text}, **body)
        error = error_of(response, 400, "invalid_filter")
        assert error["param"] == "filter"
        assert "not JSON" in error["message"]


async def test_it_stands_in_one_place(filled: httpx.AsyncClient) -> None:
    body = {"id": "1", "filter": CATS}
    response = await filled.post(f"{URL}/search", json=body, params={"filter": json.dumps(CATS)})
    assert error_of(response, 400, "invalid_parameter")["param"] == "filter"


async def test_delete_by_filter(filled: httpx.AsyncClient) -> None:
    async def delete(chosen: Any) -> Any:
        params = {"filter": json.dumps(chosen)}
        return json_of(await filled.delete(f"{URL}/images", params=params))

    assert await delete(RARE) == {"deleted": 3}
    assert await delete(RARE) == {"deleted": 0}
    for number in (3, 11, 17):
        error_of(await filled.get(f"{URL}/images/{number}"), 404, "image_not_found")
    assert json_of(await filled.delete(f"{URL}/images/4")) == {"deleted": "4"}
    assert await delete(CATS) == {"deleted": COUNT // 2 - 3}
    assert json_of(await filled.get(URL))["count"] == COUNT // 2 - 1
    found = json_of(await ask(filled, "search", {}, as_json=False, k=COUNT))["matches"]
    assert {match["metadata"]["label"] for match in found} == {"dog"}


async def test_deleting_everything_takes_more(filled: httpx.AsyncClient) -> None:
    for params in ({}, *({"filter": text} for text in ("null", "{}", '{"must": []}'))):
        response = await filled.delete(f"{URL}/images", params=params)
        assert error_of(response, 400, "invalid_filter")["param"] == "filter"
    response = await filled.delete(f"{URL}/images", params={"filters": json.dumps(CATS)})
    assert error_of(response, 422, "invalid_parameter")["param"] == "filters"
    error_of(await filled.delete(f"{URL}/images/"), 404, "image_not_found")
    assert json_of(await filled.get(URL))["count"] == COUNT
    missing = {"filter": json.dumps(CATS)}
    response = await filled.delete("/v1/collections/nowhere/images", params=missing)
    error_of(response, 404, "collection_not_found")


async def test_a_bad_filter_does_not_delete_in_another_models_collection(serve: Serve) -> None:
    async with serve() as client:
        files = {"image": ("a.png", png(1))}
        json_of(await client.post(f"{URL}/images", files=files, data={"id": "a"}))
    async with serve(model=FakeEncoder("other", "0" * 16)) as client:
        chosen = {"must": {"key": "a", "exists": False}}
        params = {"filter": json.dumps(chosen)}
        assert len(json_of(await client.get(f"{URL}/images", params=params))["images"]) == 1
        error_of(
            await client.delete(f"{URL}/images", params={"filter": "{}"}), 400, "invalid_filter"
        )
        assert json_of(await client.delete(f"{URL}/images", params=params)) == {"deleted": 1}


def test_the_description_has_it_everywhere() -> None:
    paths = created(Settings(_env_file=None), FakeEncoder()).openapi()["paths"]
    prefix = "/v1/collections/{name}"
    for path, method in (
        ("images", "get"),
        ("images", "delete"),
        ("search", "post"),
        ("copies", "post"),
        ("classify", "post"),
    ):
        route = paths[f"{prefix}/{path}"][method]
        (parameter,) = (one for one in route["parameters"] if one["name"] == "filter")
        told = [parameter, parameter["schema"]]
        if method == "post":
            body = route["requestBody"]["content"]["application/json"]["schema"]
            field = body["properties"]["filter"]
            assert field["examples"][0]["must"][0]["key"] == "label"
            told.append(field)
        assert "docs/filters.md" in str(told[0])
        assert json.loads(parameter["schema"]["examples"][0])
        assert "400" in route["responses"]
