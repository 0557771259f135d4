import hashlib
import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.service.answers import error_of, json_of
from tests.service.fakes import FakeEncoder
from tests.service.pictures import data_uri, noise, opened, png

pytestmark = pytest.mark.anyio
URL = "/v1/collections/default/images"
THUMBNAILS = "/v1/collections/default/thumbnails"


async def upload(
    client: httpx.AsyncClient,
    *contents: bytes,
    ids: list[str] | None = None,
    metadata: list[Any] | None = None,
) -> httpx.Response:
    data: dict[str, Any] = {"id": ids or []}
    if metadata is not None:
        data["metadata"] = [one if isinstance(one, str) else json.dumps(one) for one in metadata]
    files = [("image", (f"{i}.png", content)) for i, content in enumerate(contents)]
    return await client.post(URL, files=files, data=data)


async def listed(client: httpx.AsyncClient, **query: Any) -> Any:
    return json_of(await client.get(URL, params=query))


async def test_several_with_ids_and_metadata(client: httpx.AsyncClient) -> None:
    metadata = [{"label": "cat", "n": 1.5}, {"deep": {"list": [1, None, "\u00e4"]}}, {}]
    answer = json_of(
        await upload(client, png(1), png(2), png(3), ids=["a", "b", "c"], metadata=metadata)
    )
    assert answer == {
        "images": [
            {"id": i, "outcome": "created", "same_as": None, "error": None} for i in ("a", "b", "c")
        ]
    }
    page = await listed(client)
    assert [one["id"] for one in page["images"]] == ["a", "b", "c"]
    assert [one["metadata"] for one in page["images"]] == metadata
    assert page["images"][0]["content_hash"] == hashlib.sha256(png(1)).hexdigest()


async def test_without_an_id_it_is_made_from_the_content(client: httpx.AsyncClient) -> None:
    ids = [hashlib.sha256(png(seed)).hexdigest() for seed in (1, 2)]
    answer = json_of(await upload(client, png(1), png(2)))
    assert [one["id"] for one in answer["images"]] == ids
    again = json_of(await client.post(URL, content=png(1), headers={"Content-Type": "image/png"}))
    (image,) = again["images"]
    assert image == {"id": ids[0], "outcome": "unchanged", "same_as": None, "error": None}


async def test_json_and_raw_uploads(client: httpx.AsyncClient) -> None:
    body = {"images": [{"image": data_uri(png(1)), "id": "a", "metadata": {"n": 1}}]}
    assert json_of(await client.post(URL, json=body))["images"][0]["outcome"] == "created"
    response = await client.post(
        URL,
        content=png(2),
        headers={"Content-Type": "image/png"},
        params={"id": "b", "metadata": '{"n": 2}'},
    )
    (image,) = json_of(response)["images"]
    assert image == {"id": "b", "outcome": "created", "same_as": None, "error": None}
    page = await listed(client)
    assert [(one["id"], one["metadata"]) for one in page["images"]] == [
        ("a", {"n": 1}),
        ("b", {"n": 2}),
    ]


async def test_the_same_again_does_not_run_the_model(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    first = {"ids": ["a", "b"], "metadata": [{"n": 1}, {"n": 2}]}
    json_of(await upload(client, png(1), png(2), **first))
    assert encoder.calls == [("cls", 2), ("copy", 2)]
    encoder.calls.clear()
    answer = json_of(await upload(client, png(1), png(2), **first))
    assert [one["outcome"] for one in answer["images"]] == ["unchanged", "unchanged"]
    assert encoder.calls == []
    # Another picture, other metadata, a new id: each is written.
    changed = {"ids": ["a", "b", "c"], "metadata": [{"n": 1}, {"n": 3}, {}]}
    answer = json_of(await upload(client, png(3), png(2), png(2), **changed))
    assert [one["outcome"] for one in answer["images"]] == ["updated", "updated", "created"]
    page = await listed(client)
    assert [one["metadata"] for one in page["images"]] == [{"n": 1}, {"n": 3}, {}]
    assert page["images"][0]["content_hash"] == hashlib.sha256(png(3)).hexdigest()


async def test_an_id_twice_in_one_upload_leaves_the_last(client: httpx.AsyncClient) -> None:
    answer = json_of(await upload(client, png(1), png(2), ids=["a", "a"]))
    assert [one["outcome"] for one in answer["images"]] == ["created", "updated"]
    (one,) = (await listed(client))["images"]
    assert one["content_hash"] == hashlib.sha256(png(2)).hexdigest()


async def test_a_bad_picture_fails_alone(client: httpx.AsyncClient, encoder: FakeEncoder) -> None:
    answer = json_of(
        await upload(client, png(1), b"nonsense", png(2), png(3)[:60], ids=["a", "b", "c", "d"])
    )
    assert [(one["id"], one["outcome"]) for one in answer["images"]] == [
        ("a", "created"),
        ("b", "failed"),
        ("c", "created"),
        ("d", "failed"),
    ]
    errors = [one["error"] for one in answer["images"]]
    assert errors[0] is None
    assert (errors[1]["param"], errors[1]["code"]) == ("image[1]", "unsupported_image")
    assert (errors[3]["param"], errors[3]["code"]) == ("image[3]", "invalid_image")
    assert all(set(e) == {"message", "type", "param", "code"} for e in errors if e)
    assert encoder.calls == [("cls", 2), ("copy", 2)]
    assert [one["id"] for one in (await listed(client))["images"]] == ["a", "c"]


async def test_all_bad_is_still_an_answer_for_each(client: httpx.AsyncClient) -> None:
    answer = json_of(await upload(client, b"x", b"y"))
    assert [(one["id"], one["outcome"]) for one in answer["images"]] == [(None, "failed")] * 2


async def test_a_single_bad_picture_is_an_error(client: httpx.AsyncClient) -> None:
    error = error_of(await upload(client, b"nonsense", ids=["a"]), 415, "unsupported_image")
    assert error["param"] == "image[0]"
    body = {"images": [{"image": data_uri(png(1)[:60])}]}
    assert error_of(await client.post(URL, json=body), 400, "invalid_image")["param"] == "images[0]"
    assert (await listed(client))["images"] == []


async def test_counts_must_match(client: httpx.AsyncClient) -> None:
    for given, name in (
        ({"ids": ["a"]}, "id"),
        ({"ids": ["a", "b", "c"]}, "id"),
        ({"metadata": [{}]}, "metadata"),
    ):
        error = error_of(await upload(client, png(1), png(2), **given), 400, "count_mismatch")
        assert error["param"] == name
    assert (await listed(client))["images"] == []


@pytest.mark.parametrize("text", ["[1]", "5", "null", '"x"', "{", "", "{'a': 1}", '{"a": NaN}'])
async def test_metadata_must_be_a_json_object(client: httpx.AsyncClient, text: str) -> None:
    response = await upload(client, png(1), png(2), metadata=[{}, text])
    error = error_of(response, 400)
    assert error["code"] in ("invalid_metadata", "invalid_record")
    assert "metadata" in error["message"]
    assert (await listed(client))["images"] == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"images": []}, "images"),
        ({"images": {}}, "images"),
        ({"images": [{"id": "a"}]}, "images[0].image"),
        ({"images": [{"image": "x"}, {"image": "x", "id": 5}]}, "images[1].id"),
        ({"images": [{"image": "x", "metadata": [1]}]}, "images[0].metadata"),
        ({"images": [{"image": "x", "label": "cat"}]}, "images[0].label"),
        ({"image": "x"}, "images"),
    ],
)
async def test_json_that_is_no_upload(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    assert error_of(await client.post(URL, json=body), 422)["param"] == param


ODD_IDS = ["a/b/c.jpg", "/a//b/", "\u00e4 \u732b.png", "..", "a?b#c&d=e+f%2F", "x" * 512]


async def test_ids_may_be_almost_anything(client: httpx.AsyncClient) -> None:
    json_of(await upload(client, *(png(1) for _ in ODD_IDS), ids=ODD_IDS))
    assert [one["id"] for one in (await listed(client))["images"]] == ODD_IDS
    for record_id in ODD_IDS:
        # A client's URL library takes `..` out of a path, so its dots are escaped too.
        path = quote(record_id, safe="").replace(".", "%2E")
        assert json_of(await client.get(f"{URL}/{path}"))["id"] == record_id
        thumbnail = await client.get(f"{THUMBNAILS}/{path}")
        assert thumbnail.headers["content-type"] == "image/jpeg"
        assert json_of(await client.delete(f"{URL}/{path}")) == {"deleted": record_id}
        error_of(await client.get(f"{URL}/{path}"), 404, "image_not_found")
        error_of(await client.delete(f"{URL}/{path}"), 404, "image_not_found")
        error_of(await client.get(f"{THUMBNAILS}/{path}"), 404, "image_not_found")


@pytest.mark.parametrize("record_id", ["", "a\nb", "\x00", "x" * 513])
async def test_ids_that_cannot_be(client: httpx.AsyncClient, record_id: str) -> None:
    body = {"images": [{"image": data_uri(png(1)), "id": record_id}]}
    error_of(await client.post(URL, json=body), 400, "invalid_record")
    error_of(await client.get(f"{URL}/{quote(record_id, safe='')}"), 404)


async def test_pages(client: httpx.AsyncClient) -> None:
    ids = [f"r{i}" for i in range(5)]
    await upload(client, *(png(i) for i in range(5)), ids=ids)
    found, cursor = [], None
    for expected in (2, 2, 1):
        page = await listed(client, limit=2, **({"cursor": cursor} if cursor else {}))
        assert len(page["images"]) == expected
        found += [one["id"] for one in page["images"]]
        cursor = page["next_cursor"]
    assert found == ids
    assert cursor is None
    assert (await listed(client, limit=5))["next_cursor"] is None
    error_of(await client.get(URL, params={"cursor": "?"}), 400, "invalid_cursor")
    for query in ({"limit": 0}, {"limit": 1001}, {"limit": "all"}, {"page": 2}):
        (name,) = query
        assert error_of(await client.get(URL, params=query), 422)["param"] == name


async def test_thumbnails_are_small_upright_pictures(client: httpx.AsyncClient) -> None:
    await upload(client, png(1, (400, 300)), png(2, (20, 10)), ids=["large", "small"])
    large = opened((await client.get(f"{THUMBNAILS}/large")).content)
    assert (large.format, large.size) == ("JPEG", (192, 144))
    shrunk = noise(1, (400, 300)).resize((192, 144))
    difference = sum(
        abs(a - b)
        for one, two in zip(large.get_flattened_data(), shrunk.get_flattened_data(), strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert difference / (192 * 144 * 3) < 4.0
    assert opened((await client.get(f"{THUMBNAILS}/small")).content).size == (20, 10)


async def outcomes(client: httpx.AsyncClient, policy: str, *contents: bytes, **given: Any) -> Any:
    """What became of pictures as (outcome, same_as)."""
    files = [("image", ("a.png", content)) for content in contents]
    data = {"id": given["ids"], "metadata": [json.dumps(one) for one in given["metadata"]]}
    params = {"on_duplicate": policy}
    answer = json_of(await client.post(URL, files=files, data=data, params=params))
    return [(one["outcome"], one["same_as"]) for one in answer["images"]]


async def labels(client: httpx.AsyncClient) -> dict[str, Any]:
    return {one["id"]: one["metadata"].get("n") for one in (await listed(client))["images"]}


async def test_on_duplicate(client: httpx.AsyncClient) -> None:
    async def send(policy: str, new_id: str, n: int) -> Any:
        return await outcomes(client, policy, png(1), ids=[new_id], metadata=[{"n": n}])

    assert await send("skip", "a", 1) == [("created", None)]
    assert await send("skip", "b", 2) == [("skipped", "a")]
    assert await labels(client) == {"a": 1}
    assert await send("update", "b", 3) == [("updated", "a")]
    assert await send("update", "b", 3) == [("unchanged", "a")]
    assert await labels(client) == {"a": 3}
    assert await send("add", "b", 4) == [("created", None)]
    assert await labels(client) == {"a": 3, "b": 4}
    for policy in ("add", "skip", "update"):  # an id that is known decides before the content
        assert await send(policy, "b", 4) == [("unchanged", None)]
        assert await send(policy, "b", 5) == [("updated", None)]
        assert await send(policy, "b", 4) == [("updated", None)]
    assert await labels(client) == {"a": 3, "b": 4}


async def test_on_duplicate_in_json_and_by_default(client: httpx.AsyncClient) -> None:
    images = [{"image": data_uri(png(1)), "id": one} for one in ("a", "b")]
    answer = json_of(await client.post(URL, json={"images": images, "on_duplicate": "skip"}))
    assert [(one["outcome"], one["same_as"]) for one in answer["images"]] == [
        ("created", None),
        ("skipped", "a"),
    ]
    answer = json_of(await client.post(URL, json={"images": images}))
    assert [one["outcome"] for one in answer["images"]] == ["unchanged", "created"]
    for request in (
        {"json": {"images": images, "on_duplicate": "keep"}},
        {"files": {"image": ("a.png", png(1))}, "params": {"on_duplicate": "keep"}},
    ):
        error = error_of(await client.post(URL, **request), 422, "invalid_parameter")
        assert error["param"] == "on_duplicate"


@pytest.mark.parametrize("policy", ["add", "skip", "update"])
async def test_the_same_again_is_free_under_each_policy(
    client: httpx.AsyncClient, encoder: FakeEncoder, policy: str
) -> None:
    given = {"ids": ["a", "b"], "metadata": [{"n": 1}, {"n": 2}]}
    assert await outcomes(client, "add", png(1), png(1), **given) == [("created", None)] * 2
    encoder.calls.clear()
    assert await outcomes(client, policy, png(1), png(1), **given) == [("unchanged", None)] * 2
    assert encoder.calls == []


async def test_what_is_known_counts_in_the_order_of_the_request(client: httpx.AsyncClient) -> None:
    known = {"ids": ["a"], "metadata": [{"n": 1}]}
    await outcomes(client, "add", png(1), **known)
    # Another content for `a`, then its old one again: the last stays.
    twice = {"ids": ["a", "a"], "metadata": [{"n": 1}, {"n": 1}]}
    found = await outcomes(client, "add", png(2), png(1), **twice)
    assert found == [("updated", None), ("updated", None)]
    hashes = [one["content_hash"] for one in (await listed(client))["images"]]
    assert hashes == [hashlib.sha256(png(1)).hexdigest()]
    # Another's upload updates `a`, then `a` itself comes as it was.
    both = {"ids": ["b", "a"], "metadata": [{"n": 9}, {"n": 1}]}
    found = await outcomes(client, "update", png(1), png(1), **both)
    assert found == [("updated", "a"), ("updated", None)]
    assert await labels(client) == {"a": 1}
