"""The index of a collection over HTTP: chosen by PUT, told by GET."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import PATIENCE_S, FakeEncoder
from tests.service.pictures import png

pytestmark = pytest.mark.anyio
URL = "/v1/collections/cats"
DEFAULTS = {
    "kind": "auto",
    "hnsw_m": 32,
    "ef_construction": 80,
    "lists": None,
    "pq_bytes": None,
    "target_recall": 0.99,
}


async def index_of(client: httpx.AsyncClient) -> dict[str, Any]:
    index: dict[str, Any] = json_of(await client.get(URL))["index"]
    return index


async def test_what_is_told(client: httpx.AsyncClient) -> None:
    made = json_of(await client.put(URL), 201)
    assert set(made) == {"name", "count", "model", "created_at", "index"}
    await client.post(f"{URL}/images", files={"image": ("a.png", png(1))})
    index = await index_of(client)
    assert index["settings"] == DEFAULTS
    assert (index["metric"], index["removed"]) == ("cosine", 0)
    assert index["disk_bytes"] > 0
    assert index["memory_bytes"] > 0
    for space, dimension in (("cls", 48), ("copy", 96)):
        told = index["spaces"][space]
        assert (told["kind"], told["dimension"], told["rows"]) == ("flat", dimension, 1)
        assert (told["pending"], told["effort"], told["recall"]) == (0, 0, 1.0)
    (cats, _) = json_of(await client.get("/v1/collections"))["collections"]
    assert set(cats) == {"name", "count", "model", "created_at"}


async def test_a_new_collection_takes_settings(client: httpx.AsyncClient) -> None:
    body = {"index": {"kind": "hnsw", "hnsw_m": 16}}
    made = json_of(await client.put(URL, json=body), 201)
    assert made["index"]["settings"] == DEFAULTS | {"kind": "hnsw", "hnsw_m": 16}
    for nothing in ({}, {"index": None}):
        kept = json_of(await client.put(URL, json=nothing))
        assert kept["index"]["settings"] == made["index"]["settings"]
    kept = json_of(await client.put(URL))
    assert kept["index"]["settings"] == made["index"]["settings"]


async def test_an_old_collection_takes_others_and_keeps_its_pictures(
    client: httpx.AsyncClient,
) -> None:
    json_of(await client.put(URL), 201)
    files = [("image", ("a.png", png(seed))) for seed in range(20)]
    json_of(await client.post(f"{URL}/images", files=files))
    picture = {"files": {"image": ("a.png", png(3))}}
    before = json_of(await client.post(f"{URL}/search", **picture))
    answer = json_of(await client.put(URL, json={"index": {"kind": "hnsw"}}))
    assert answer["count"] == 20
    async with asyncio.timeout(PATIENCE_S):
        while (index := await index_of(client))["is_building"]:
            await asyncio.sleep(0.01)
    assert index["settings"] == DEFAULTS | {"kind": "hnsw"}
    assert {told["kind"] for told in index["spaces"].values()} == {"hnsw"}
    assert {told["pending"] for told in index["spaces"].values()} == {0}
    after = json_of(await client.post(f"{URL}/search", **picture))
    assert [match["id"] for match in after["matches"]] == [m["id"] for m in before["matches"]]
    # What is left out takes its default: PUT tells all of it.
    answer = json_of(await client.put(URL, json={"index": {"target_recall": 0.5}}))
    assert answer["index"]["settings"] == DEFAULTS | {"target_recall": 0.5}


async def test_settings_outlive_a_restart(serve: Serve) -> None:
    async with serve() as client:
        json_of(await client.put(URL, json={"index": {"kind": "hnsw"}}), 201)
    async with serve() as client:
        assert (await index_of(client))["settings"]["kind"] == "hnsw"


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"hnsw_m": 3}, "hnsw_m must be a whole number from 4 to 256"),
        ({"lists": 0}, "lists"),
        ({"target_recall": 0.0}, "target_recall must be in (0, 1]"),
        ({"kind": "ivf_pq", "pq_bytes": 7}, "pq_bytes must divide the dimension, 48, got 7"),
        ({"pq_bytes": 96}, "pq_bytes must divide the dimension, 48, got 96"),
    ],
)
async def test_settings_that_cannot_be(
    client: httpx.AsyncClient, index: dict[str, Any], told: str
) -> None:
    error = error_of(await client.put(URL, json={"index": index}), 400, "invalid_settings")
    assert (error["param"], told in error["message"]) == ("index", True)
    error_of(await client.get(URL), 404, "collection_not_found")
    json_of(await client.put(URL, json={"index": {"kind": "hnsw"}}), 201)
    error_of(await client.put(URL, json={"index": index}), 400, "invalid_settings")
    assert (await index_of(client))["settings"] == DEFAULTS | {"kind": "hnsw"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"index": {"kind": "tree"}}, "index.kind"),
        ({"index": {"kind": None}}, "index.kind"),
        ({"index": {"trees": 5}}, "index.trees"),
        ({"index": {"hnsw_m": "many"}}, "index.hnsw_m"),
        ({"index": 5}, "index"),
        ({"kind": "flat"}, "kind"),
    ],
)
async def test_bodies_of_another_shape(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    error = error_of(await client.put(URL, json=body), 422, "invalid_parameter")
    assert error["param"] == param
    error_of(await client.get(URL), 404, "collection_not_found")


async def test_bodies_that_are_no_json(client: httpx.AsyncClient) -> None:
    for content, kind, status, code in (
        (b"{", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 422, "invalid_parameter"),
        (b"index=flat", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"{}", "", 415, "unsupported_media_type"),
    ):
        response = await client.put(URL, content=content, headers={"Content-Type": kind})
        error_of(response, status, code)
    json_of(await client.put(URL, headers={"Content-Type": "application/json"}), 201)  # no body


async def test_another_models_collection_is_not_configured(serve: Serve) -> None:
    async with serve() as client:
        json_of(await client.put(URL), 201)
    async with serve(model=FakeEncoder("other", "0" * 16)) as client:
        response = await client.put(URL, json={"index": {"kind": "hnsw"}})
        error_of(response, 409, "model_mismatch")
        assert (await index_of(client))["settings"] == DEFAULTS
