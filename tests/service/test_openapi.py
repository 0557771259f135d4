"""The API's description, walked from end to end: nothing in it is left without a word."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.service.pictures import data_uri, encoded, noise

METHODS = {"get", "put", "post", "delete", "patch"}
ERROR = "#/components/schemas/ErrorAnswer"
WITHOUT_ERRORS = {"/healthz", "/readyz", "/v1/models", "/metrics"}  # nothing can be wrong in them


@pytest.fixture
def description(make_app: Callable[..., FastAPI]) -> dict[str, Any]:
    return make_app().openapi()


def operations(description: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in description["paths"].items():
        for method in METHODS & set(item):
            yield f"{method.upper()} {path}", item[method]


def test_every_operation_says_what_it_does(description: dict[str, Any]) -> None:
    found = dict(operations(description))
    assert "POST /v1/embeddings" in found
    for name, operation in found.items():
        assert operation.get("summary"), name
        assert operation.get("description"), name
        assert operation.get("tags"), name


def test_every_parameter_is_described(description: dict[str, Any]) -> None:
    missing = [
        f"{name}: {parameter['name']}"
        for name, operation in operations(description)
        for parameter in operation.get("parameters", [])
        if not parameter.get("description")
    ]
    assert not missing


def test_every_field_is_described(description: dict[str, Any]) -> None:
    """Of what comes in and of what goes out, however deep."""
    missing: list[str] = []

    def walk(schema: Any, where: str) -> None:
        if isinstance(schema, list):
            for part in schema:
                walk(part, where)
        if not isinstance(schema, dict):
            return
        for name, field in schema.get("properties", {}).items():
            if not field.get("description"):
                missing.append(f"{where}.{name}")
            walk(field, f"{where}.{name}")
        for part in ("items", "anyOf", "oneOf", "allOf", "prefixItems", "additionalProperties"):
            walk(schema.get(part), where)

    for name, schema in description["components"]["schemas"].items():
        assert schema.get("description"), name
        walk(schema, name)
    for name, operation in operations(description):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            walk(content["schema"], name)
    assert not missing


def test_every_json_body_has_examples(description: dict[str, Any]) -> None:
    bodies = [
        (name, operation["requestBody"]["content"])
        for name, operation in operations(description)
        if "requestBody" in operation
    ]
    assert len(bodies) >= 6
    for name, content in bodies:
        assert content["application/json"].get("examples"), name


def test_every_answer_says_its_media_types(description: dict[str, Any]) -> None:
    for name, operation in operations(description):
        for status, answer in operation["responses"].items():
            assert answer.get("description"), (name, status)
            assert answer.get("content"), (name, status)
            for kind, content in answer["content"].items():
                assert content.get("schema"), (name, status, kind)


def test_errors_are_listed_and_have_one_shape(description: dict[str, Any]) -> None:
    for name, operation in operations(description):
        answers = operation["responses"]
        failures = {int(s): a for s, a in answers.items() if s >= "400"}
        path = name.partition(" ")[2]
        if path in WITHOUT_ERRORS:
            assert set(failures) <= {401, 403, 429, 503}, name
            continue
        assert 503 in failures, name
        if operation.get("parameters"):
            assert {400, 422} <= set(failures), name
        if "{" in path:
            assert 404 in failures, name
        if "requestBody" in operation:
            assert {400, 413, 415, 422, 429} <= set(failures), name
        for status, answer in failures.items():
            if status == 416:  # the server's own answer to a header
                continue
            assert answer["content"] == {"application/json": {"schema": {"$ref": ERROR}}}, name
        if 429 in failures:
            assert "Retry-After" in failures[429]["headers"], name
    assert "HTTPValidationError" not in description["components"]["schemas"]


@pytest.mark.anyio
async def test_the_examples_work(client: httpx.AsyncClient, description: dict[str, Any]) -> None:
    """Each is sent as it stands; collections are `default`, and hold the picture of the example."""
    picture = {"id": "cat-1", "image": data_uri(encoded(noise(1)))}
    filled = await client.post("/v1/collections/default/images", json={"images": [picture]})
    assert filled.status_code == 200
    sent = 0
    for name, operation in operations(description):
        method, path = name.split(" ")
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in content.get("examples", {}).values():
            url = path.replace("{name}", "default")
            response = await client.request(method, url, json=example["value"])
            assert response.status_code == 200, (name, example, response.text)
            sent += 1
    assert sent >= 9


@pytest.mark.anyio
async def test_the_pages_are_there(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs", follow_redirects=True)
    assert page.status_code == 200
    description = await client.get("/openapi.json")
    assert description.json()["info"]["title"] == "dinoscope"
