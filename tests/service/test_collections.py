from pathlib import Path
from typing import Any

import httpx
import pytest

from index.errors import StoreInUse
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import png

pytestmark = pytest.mark.anyio
URL = "/v1/collections"


async def names(client: httpx.AsyncClient) -> list[str]:
    return [one["name"] for one in json_of(await client.get(URL))["collections"]]


def without_index(response: httpx.Response, status: int = 200) -> dict[str, Any]:
    """What of a collection's answer does not change by work in the background."""
    answer: dict[str, Any] = json_of(response, status)
    return {key: value for key, value in answer.items() if key != "index"}


async def test_default_is_there_from_the_start(client: httpx.AsyncClient) -> None:
    assert await names(client) == ["default"]
    answer = json_of(await client.get(f"{URL}/default"))
    assert answer["name"] == "default"
    assert answer["count"] == 0
    assert answer["model"] == "f" * 16
    assert answer["created_at"] > 1.6e9


async def test_make_look_at_list_and_delete(client: httpx.AsyncClient) -> None:
    made = without_index(await client.put(f"{URL}/cats"), 201)
    assert without_index(await client.put(f"{URL}/cats"), 200) == made
    assert without_index(await client.get(f"{URL}/cats")) == made
    assert await names(client) == ["cats", "default"]
    await client.post(f"{URL}/cats/images", files={"image": ("a.png", png(1))})
    assert json_of(await client.get(f"{URL}/cats"))["count"] == 1
    assert json_of(await client.delete(f"{URL}/cats")) == {"deleted": "cats"}
    error_of(await client.get(f"{URL}/cats"), 404, "collection_not_found")
    error_of(await client.delete(f"{URL}/cats"), 404, "collection_not_found")
    assert json_of(await client.put(f"{URL}/cats"), 201)["count"] == 0


@pytest.mark.parametrize("name", ["Cats", "-cats", "c.ts", "c ts", "k%C3%A4tzchen", "c" * 64])
async def test_names_that_cannot_be(client: httpx.AsyncClient, name: str) -> None:
    error_of(await client.put(f"{URL}/{name}"), 400, "invalid_name")
    error_of(await client.get(f"{URL}/{name}"), 404, "collection_not_found")
    assert await names(client) == ["default"]


async def test_every_route_says_that_the_collection_is_missing(client: httpx.AsyncClient) -> None:
    picture = {"image": ("a.png", png(1))}
    for method, path in (
        ("GET", "images"),
        ("GET", "images/a"),
        ("DELETE", "images/a"),
        ("GET", "thumbnails/a"),
        ("POST", "images"),
        ("POST", "search"),
        ("POST", "copies"),
        ("POST", "classify"),
        ("POST", "snapshots"),
        ("GET", "snapshots"),
    ):
        files = picture if method == "POST" else None
        response = await client.request(method, f"{URL}/nowhere/{path}", files=files)
        assert "'nowhere'" in error_of(response, 404, "collection_not_found")["message"]


async def test_a_restart_keeps_everything(serve: Serve) -> None:
    async with serve() as client:
        json_of(await client.put(f"{URL}/cats"), 201)
        for seed in (1, 2):
            await client.post(
                f"{URL}/cats/images",
                files={"image": ("a.png", png(seed))},
                data={"id": f"cat {seed}", "metadata": f'{{"n": {seed}}}'},
            )
        pages = json_of(await client.get(f"{URL}/cats/images"))
        thumbnail = (await client.get(f"{URL}/cats/thumbnails/cat 1")).content
        found = json_of(await client.post(f"{URL}/cats/search", json={"id": "cat 1"}))
    async with serve() as client:
        assert await names(client) == ["cats", "default"]
        assert json_of(await client.get(f"{URL}/cats/images")) == pages
        assert (await client.get(f"{URL}/cats/thumbnails/cat 1")).content == thumbnail
        assert json_of(await client.post(f"{URL}/cats/search", json={"id": "cat 1"})) == found
        assert [match["id"] for match in found["matches"]] == ["cat 2"]


async def test_another_models_collection_is_explained(serve: Serve) -> None:
    picture = {"image": ("a.png", png(1))}
    async with serve() as client:
        await client.post(f"{URL}/default/images", files=picture, data={"id": "a"})
    other = FakeEncoder("other", "0" * 16)
    async with serve(model=other) as client:
        for path, body in (
            ("images", {"files": picture}),
            ("search", {"files": picture}),
            ("search", {"json": {"id": "a"}}),
            ("copies", {"files": picture}),
            ("classify", {"files": picture, "params": {"label": "x"}}),
        ):
            response = await client.post(f"{URL}/default/{path}", **body)
            message = error_of(response, 409, "model_mismatch")["message"]
            for told in ("'default'", "f" * 16, "0" * 16, "other"):
                assert told in message
        error_of(await client.put(f"{URL}/default"), 409, "model_mismatch")
        # What is in it can still be looked at, and it can be deleted and made anew.
        assert json_of(await client.get(f"{URL}/default"))["count"] == 1
        assert json_of(await client.get(f"{URL}/default/images/a"))["id"] == "a"
        json_of(await client.delete(f"{URL}/default"))
        json_of(await client.put(f"{URL}/default"), 201)
        json_of(await client.post(f"{URL}/default/images", files=picture))


async def test_an_empty_default_follows_the_model(serve: Serve) -> None:
    async with serve() as client:
        json_of(await client.put(f"{URL}/cats"), 201)
    async with serve(model=FakeEncoder("other", "0" * 16)) as client:
        assert json_of(await client.get(f"{URL}/default"))["model"] == "0" * 16
        assert json_of(await client.get(f"{URL}/cats"))["model"] == "f" * 16
        files = {"image": ("a.png", png(1))}
        json_of(await client.post(f"{URL}/default/images", files=files))


async def test_metadata_is_compared_as_json(client: httpx.AsyncClient) -> None:
    for metadata, outcome in (('{"a": 1}', "created"), ('{"a": true}', "updated")):
        files, data = {"image": ("a.png", png(1))}, {"id": "a", "metadata": metadata}
        answer = json_of(await client.post(f"{URL}/default/images", files=files, data=data))
        assert answer["images"][0]["outcome"] == outcome


async def test_one_folder_has_one_service(serve: Serve, tmp_path: Path) -> None:
    async with serve() as client:
        with pytest.raises(StoreInUse, match="in use by process") as caught:
            async with serve():
                pytest.fail("a second service has started")
        assert str(tmp_path / "data") in str(caught.value)
        assert await names(client) == ["default"]
    async with serve() as client:  # and afterwards the folder is free
        assert await names(client) == ["default"]


async def test_a_damaged_collection_hurts_no_other(serve: Serve, tmp_path: Path) -> None:
    async with serve() as client:
        json_of(await client.put(f"{URL}/cats"), 201)
        assert json_of(await client.get("/readyz")) == {"status": "ok", "reasons": []}
    for path in (tmp_path / "data" / "cats").iterdir():
        path.write_bytes(b"not a database at all" * 100)
    async with serve() as client:
        assert await names(client) == ["default"]
        for response in (await client.get(f"{URL}/cats"), await client.put(f"{URL}/cats")):
            assert "'cats'" in error_of(response, 503, "store_damaged")["message"]
        answer = json_of(await client.get("/readyz"))
        assert answer["status"] == "ok"  # the other collections work
        assert "'cats'" in answer["reasons"][0]
        assert json_of(await client.get("/healthz"))["status"] == "ok"
        json_of(await client.delete(f"{URL}/cats"))
        assert json_of(await client.get("/readyz"))["status"] == "ok"
