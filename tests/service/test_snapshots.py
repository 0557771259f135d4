import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import png

pytestmark = pytest.mark.anyio
URL = "/v1/collections/cats"
SNAPSHOTS = f"{URL}/snapshots"


async def add(client: httpx.AsyncClient, *seeds: int) -> None:
    files = [("image", ("a.png", png(seed))) for seed in seeds]
    data = {
        "id": [f"cat {seed}" for seed in seeds],
        "metadata": [json.dumps({"n": seed}) for seed in seeds],
    }
    json_of(await client.post(f"{URL}/images", files=files, data=data))


async def searched(client: httpx.AsyncClient) -> Any:
    answer = await client.post(f"{URL}/search", files={"image": ("a.png", png(1))})
    return json_of(answer)["matches"]


async def take(client: httpx.AsyncClient) -> dict[str, Any]:
    made: dict[str, Any] = json_of(await client.post(SNAPSHOTS), 201)
    return made


@pytest.fixture
async def filled(client: httpx.AsyncClient) -> httpx.AsyncClient:
    json_of(await client.put(URL), 201)
    await add(client, 1, 2, 3)
    return client


async def test_make_list_and_delete(filled: httpx.AsyncClient) -> None:
    assert json_of(await filled.get(SNAPSHOTS)) == {"snapshots": []}
    first = await take(filled)
    assert set(first) == {"name", "collection", "created_at", "bytes", "count", "model"}
    assert (first["collection"], first["count"], first["model"]) == ("cats", 3, "f" * 16)
    assert first["bytes"] > 0
    await add(filled, 4)
    second = await take(filled)
    assert second["count"] == 4
    assert json_of(await filled.get(SNAPSHOTS)) == {"snapshots": [first, second]}
    deleted = json_of(await filled.delete(f"{SNAPSHOTS}/{first['name']}"))
    assert deleted == {"deleted": first["name"]}
    assert json_of(await filled.get(SNAPSHOTS)) == {"snapshots": [second]}
    error_of(await filled.delete(f"{SNAPSHOTS}/{first['name']}"), 404, "snapshot_not_found")


async def test_restore_undoes_what_came_since(filled: httpx.AsyncClient) -> None:
    before = await searched(filled)
    pages = json_of(await filled.get(f"{URL}/images"))
    thumbnail = (await filled.get(f"{URL}/thumbnails/cat 2")).content
    made = await take(filled)
    await add(filled, 4)
    json_of(await filled.delete(f"{URL}/images/cat 2"))
    answer = json_of(await filled.post(f"{SNAPSHOTS}/{made['name']}/restore"))
    assert (answer["name"], answer["count"], answer["model"]) == ("cats", 3, "f" * 16)
    assert answer["index"]["spaces"]["cls"]["rows"] == 3
    assert await searched(filled) == before
    assert json_of(await filled.get(f"{URL}/images")) == pages
    assert (await filled.get(f"{URL}/thumbnails/cat 2")).content == thumbnail
    await add(filled, 5)  # and it goes on
    assert json_of(await filled.get(URL))["count"] == 4


async def test_restore_of_a_deleted_collection(filled: httpx.AsyncClient) -> None:
    before, made = await searched(filled), await take(filled)
    json_of(await filled.delete(URL))
    error_of(await filled.get(URL), 404, "collection_not_found")
    error_of(await filled.post(SNAPSHOTS), 404, "collection_not_found")
    assert json_of(await filled.get(SNAPSHOTS)) == {"snapshots": [made]}
    json_of(await filled.post(f"{SNAPSHOTS}/{made['name']}/restore"))
    assert await searched(filled) == before


async def test_restore_of_a_damaged_collection(serve: Serve, tmp_path: Path) -> None:
    async with serve() as client:
        json_of(await client.put(URL), 201)
        await add(client, 1, 2)
        before, made = await searched(client), await take(client)
    (tmp_path / "data" / "cats" / "collection.sqlite").write_bytes(b"no database" * 1000)
    async with serve() as client:
        error_of(await client.get(URL), 503, "store_damaged")
        error_of(await client.post(SNAPSHOTS), 503, "store_damaged")
        assert json_of(await client.get(SNAPSHOTS)) == {"snapshots": [made]}
        json_of(await client.post(f"{SNAPSHOTS}/{made['name']}/restore"))
        assert await searched(client) == before
        assert json_of(await client.get("/readyz")) == {"status": "ok", "reasons": []}


async def test_restore_of_another_models_collection(serve: Serve) -> None:
    async with serve() as client:
        json_of(await client.put(URL), 201)
        await add(client, 1)
        made = await take(client)
    async with serve(model=FakeEncoder("other", "0" * 16)) as client:
        answer = json_of(await client.post(f"{SNAPSHOTS}/{made['name']}/restore"))
        assert (answer["model"], answer["count"]) == ("f" * 16, 1)
        response = await client.post(f"{URL}/search", files={"image": ("a.png", png(1))})
        error_of(response, 409, "model_mismatch")


async def test_download(filled: httpx.AsyncClient, tmp_path: Path) -> None:
    made = await take(filled)
    response = await filled.get(f"{SNAPSHOTS}/{made['name']}")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/vnd.sqlite3"
    assert f'filename="cats-{made["name"]}.sqlite"' in response.headers["content-disposition"]
    assert len(response.content) == made["bytes"]
    (tmp_path / "copy.sqlite").write_bytes(response.content)
    with closing(sqlite3.connect(tmp_path / "copy.sqlite")) as copy:
        ids = [record_id for (record_id,) in copy.execute("SELECT id FROM records ORDER BY key")]
    assert ids == ["cat 1", "cat 2", "cat 3"]
    part = await filled.get(f"{SNAPSHOTS}/{made['name']}", headers={"Range": "bytes=0-15"})
    assert part.status_code == 206
    assert part.content == b"SQLite format 3\0"


@pytest.mark.parametrize(
    "header",
    ["", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=9-3", "pages=1-2", "bytes=1-2,x"],
)
async def test_a_range_that_is_none(filled: httpx.AsyncClient, header: str) -> None:
    made = await take(filled)
    response = await filled.get(f"{SNAPSHOTS}/{made['name']}", headers={"Range": header})
    error = error_of(response, 400, "invalid_range")
    assert error["param"] == "Range"
    assert f"Range: {header!r} is not" in error["message"]


@pytest.mark.parametrize("header", ["bytes={size}-", "bytes=0-1,{size}-", "bytes=-0"])
async def test_a_range_behind_the_end(filled: httpx.AsyncClient, header: str) -> None:
    made = await take(filled)
    asked = header.format(size=made["bytes"])
    response = await filled.get(f"{SNAPSHOTS}/{made['name']}", headers={"Range": asked})
    assert f"the file has {made['bytes']}" in error_of(response, 416, "http_error")["message"]
    assert response.headers["content-range"] == f"bytes */{made['bytes']}"


async def test_a_range_of_another_file_counts_for_nothing(filled: httpx.AsyncClient) -> None:
    made = await take(filled)
    url = f"{SNAPSHOTS}/{made['name']}"
    whole = await filled.get(url)
    asked = {"Range": f"bytes={made['bytes']}-"}
    other = await filled.get(url, headers={**asked, "If-Range": '"stale"'})
    assert (other.status_code, other.content) == (200, whole.content)
    same = await filled.get(url, headers={**asked, "If-Range": whole.headers["etag"]})
    error_of(same, 416, "http_error")


async def test_the_last_bytes_and_several_ranges(filled: httpx.AsyncClient) -> None:
    made = await take(filled)
    url = f"{SNAPSHOTS}/{made['name']}"
    whole = (await filled.get(url)).content
    last = await filled.get(url, headers={"Range": "bytes=-100"})
    assert (last.status_code, last.content) == (206, whole[-100:])
    several = await filled.get(url, headers={"Range": "bytes=0-15, 32-47"})
    assert several.status_code == 206
    assert whole[:16] in several.content
    assert whole[32:48] in several.content


async def test_a_snapshot_whose_file_has_gone(filled: httpx.AsyncClient, tmp_path: Path) -> None:
    made = await take(filled)
    (tmp_path / "data" / ".snapshots" / "cats" / f"{made['name']}.sqlite").unlink()
    error_of(await filled.get(f"{SNAPSHOTS}/{made['name']}"), 404, "snapshot_not_found")
    response = await filled.post(f"{SNAPSHOTS}/{made['name']}/restore")
    assert "its file is missing" in error_of(response, 409, "snapshot_damaged")["message"]
    assert json_of(await filled.get(URL))["count"] == 3


async def test_a_damaged_snapshot_changes_nothing(
    filled: httpx.AsyncClient, tmp_path: Path
) -> None:
    made = await take(filled)
    file = tmp_path / "data" / ".snapshots" / "cats" / f"{made['name']}.sqlite"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = await searched(filled)
    response = await filled.post(f"{SNAPSHOTS}/{made['name']}/restore")
    assert made["name"] in error_of(response, 409, "snapshot_damaged")["message"]
    assert await searched(filled) == before


@pytest.mark.parametrize("name", ["20200101T000000Z", "%2e%2e", "x", "*", "a%00b", "%C3%BC"])
async def test_snapshots_that_are_not_there(filled: httpx.AsyncClient, name: str) -> None:
    made = await take(filled)
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/restore")):
        url = f"{SNAPSHOTS}/{name}{path}"
        error = error_of(await filled.request(method, url), 404)
        assert error["code"] in ("snapshot_not_found", "not_found")
    assert json_of(await filled.get(SNAPSHOTS)) == {"snapshots": [made]}


async def test_collections_that_are_not_there(filled: httpx.AsyncClient) -> None:
    made = await take(filled)
    for name in ("dogs", "Cats", "%2e%2e", ".snapshots"):
        url = f"/v1/collections/{name}/snapshots"
        for method in ("GET", "POST"):
            error_of(await filled.request(method, url), 404, "collection_not_found")
        for method in ("GET", "DELETE"):
            response = await filled.request(method, f"{url}/{made['name']}")
            error_of(response, 404, "snapshot_not_found")
        response = await filled.post(f"{url}/{made['name']}/restore")
        error_of(response, 404 if name == "dogs" else 400)


async def test_they_outlive_a_restart(serve: Serve) -> None:
    async with serve() as client:
        json_of(await client.put(URL), 201)
        await add(client, 1)
        made = await take(client)
        json_of(await client.delete(URL))
    async with serve() as client:
        assert json_of(await client.get(SNAPSHOTS)) == {"snapshots": [made]}
        assert json_of(await client.post(f"{SNAPSHOTS}/{made['name']}/restore"))["count"] == 1


async def test_requests_while_a_collection_is_restored(filled: httpx.AsyncClient) -> None:
    """Each is answered from before, from after, or with 404; none with a 5xx."""
    made = await take(filled)
    await add(filled, 4)
    over = asyncio.Event()
    seen: dict[str, set[int]] = {}
    picture = {"image": ("a.png", png(1))}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"{URL}/search", {"files": picture}),
        ("POST", f"{URL}/search", {"json": {"id": "cat 1", "filter": {}}}),
        ("POST", f"{URL}/copies", {"files": picture}),
        ("POST", f"{URL}/images", {"files": picture, "data": {"id": "cat 9"}}),
        ("GET", f"{URL}/images", {"params": {"filter": '{"must": {"key": "n", "exists": true}}'}}),
        ("GET", URL, {}),
        ("PUT", URL, {"json": {"index": {"kind": "hnsw"}}}),
        ("GET", "/v1/collections", {}),
        ("GET", "/readyz", {}),
        ("POST", SNAPSHOTS, {}),
    ]

    async def repeat(method: str, url: str, options: dict[str, Any]) -> None:
        while not over.is_set():
            response = await filled.request(method, url, **options)
            if response.status_code == 404:
                error_of(response, 404, "collection_not_found")
            seen.setdefault(f"{method} {url}", set()).add(response.status_code)
            await asyncio.sleep(0)  # readiness is told without a wait, and would keep the loop

    tasks = [asyncio.ensure_future(repeat(*request)) for request in requests]
    for _ in range(12):
        json_of(await filled.post(f"{SNAPSHOTS}/{made['name']}/restore"))
    over.set()
    await asyncio.gather(*tasks)
    assert set.union(*seen.values()) <= {200, 201, 404}, seen
    assert {200} == seen["GET /readyz"] == seen["GET /v1/collections"]
    json_of(await filled.post(f"{SNAPSHOTS}/{made['name']}/restore"))
    assert (await searched(filled))[0]["id"] == "cat 1"
    assert json_of(await filled.get(URL))["count"] == 3
