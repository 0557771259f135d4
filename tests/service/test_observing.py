"""What is told of a request: its line in the log, its metrics, its id."""

import asyncio
import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.logs import JsonFormatter, TextFormatter
from service.metrics import Metrics
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder
from tests.service.pictures import as_base64, data_uri, png

pytestmark = pytest.mark.anyio
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
DASHBOARD = Path(__file__).parents[2] / "docker" / "grafana-dashboard.json"


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The lines about requests, as they are written."""
    records = [one for one in caplog.records if one.name == "service.requests"]
    return [json.loads(JsonFormatter().format(record)) for record in records]


@pytest.fixture(autouse=True)
def everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="service.requests")


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, values of the labels by the labels' names) -> value."""
    text = (await client.get("/metrics")).text
    return {
        (sample.name, tuple(dict(sorted(sample.labels.items())).values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_line_for_each_request(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    content = png(1, (40, 30))
    path = "/v1/collections/default/images"
    upload = await client.post(
        path, files={"image": ("secret.png", content)}, data={"id": "a secret id"}
    )
    json_of(await client.get(f"{path}/a secret id", params={}))
    search = await client.post(
        "/v1/collections/default/search?k=1", files={"image": ("secret.png", content)}
    )
    error_of(await client.get("/v1/collections/default/images/another secret"), 404)
    error_of(await client.get("/secret"), 404)
    lines = told(caplog)
    assert [(one["method"], one["route"], one["status"]) for one in lines] == [
        ("POST", "/v1/collections/{name}/images", 200),
        ("GET", "/v1/collections/{name}/images/{id}", 200),
        ("POST", "/v1/collections/{name}/search", 200),
        ("GET", "/v1/collections/{name}/images/{id}", 404),
        ("GET", "(unknown)", 404),
    ]
    assert [one["error_code"] for one in lines] == [None] * 3 + ["image_not_found", "not_found"]
    first, third = lines[0], lines[2]
    assert (first["pictures"], first["sizes"], first["model"]) == (1, ["40x30"], "fake")
    assert first["client"] == "127.0.0.1"
    assert first["received_bytes"] > len(content)
    assert first["sent_bytes"] == len(upload.content)
    for name in ("decode_wait_s", "decode_s", "queue_s", "inference_s"):
        assert 0 <= first[name] <= first["total_s"] * 2  # two tasks side by side
    assert "search_s" not in first
    assert 0 < third["search_s"] < third["total_s"]
    assert third["request_id"] == search.headers["x-request-id"]
    written = "\n".join(json.dumps(line) for line in lines)
    assert "secret" not in written
    assert as_base64(content)[:20] not in written


async def test_probes_are_not_worth_a_line(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await client.get(path)).status_code == 200
    assert {one["level"] for one in told(caplog)} == {"debug"}


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("abc-1_2.3:4", True),
        ("x" * 128, True),
        ("", False),
        ("x" * 129, False),
        ('a" b', False),
        ("a\tb", False),
    ],
)
async def test_request_ids(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, given: str, taken: bool
) -> None:
    answer = await client.get("/v1/models", headers={"X-Request-ID": given})
    given_back = answer.headers["x-request-id"]
    assert (given_back == given) is taken
    assert taken or re.fullmatch("[0-9a-f]{32}", given_back)
    assert told(caplog)[-1]["request_id"] == given_back


async def test_what_nobody_foresaw_is_seen(
    client: httpx.AsyncClient,
    encoder: FakeEncoder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def explode(*_: object, **__: object) -> Any:
        raise KeyError("a reason for those who keep the service")

    monkeypatch.setattr(encoder, "prepare", explode)
    answer = await client.post("/v1/embeddings", json={"input": data_uri(png(1))})
    error_of(answer, 500, "internal_error")
    failure, line = told(caplog)
    assert answer.headers["x-request-id"] == line["request_id"]
    assert (line["status"], line["error_code"]) == (500, "internal_error")
    assert failure["message"] == "/v1/embeddings failed"
    assert "KeyError: 'a reason" in failure["traceback"]
    assert (await samples(client))[
        "dinoscope_http_requests_total", ("POST", "/v1/embeddings", "500")
    ] == 1


async def test_metrics_of_requests_and_pictures(
    client: httpx.AsyncClient, encoder: FakeEncoder
) -> None:
    before = await samples(client)
    body = {"input": [data_uri(png(seed)) for seed in range(3)]}
    json_of(await client.post("/v1/embeddings", json=body))
    error_of(await client.post("/v1/embeddings", json={"input": "?"}), 400)
    for i in range(5):
        error_of(await client.get(f"/nothing/{i}"), 404)
    await client.request("BREW", "/v1/embeddings")
    found = await samples(client)
    requests = "dinoscope_http_requests_total"
    assert found[requests, ("POST", "/v1/embeddings", "200")] == 1
    assert found[requests, ("POST", "/v1/embeddings", "400")] == 1
    assert found[requests, ("GET", "(unknown)", "404")] == 5
    assert found[requests, ("(other)", "/v1/embeddings", "405")] == 1
    assert found["dinoscope_http_request_duration_seconds_count", ("POST", "/v1/embeddings")] == 2
    assert found["dinoscope_pictures_total", ()] == 3
    assert found["dinoscope_picture_bytes_total", ()] == sum(len(png(seed)) for seed in range(3))
    assert found["dinoscope_decode_seconds_count", ()] == 3  # the bad one is none before that
    assert found["dinoscope_inference_seconds_count", ("fake", "cls")] == 1
    assert found["dinoscope_batch_size_pictures_sum", ("fake", "cls")] == 3
    assert found["dinoscope_queue_wait_seconds_count", ("fake",)] == 3
    assert found["dinoscope_queue_depth_pictures", ("fake",)] == 0
    assert found["dinoscope_queue_limit_pictures", ("fake",)] == 512
    assert found["dinoscope_http_requests_in_progress", ()] == 1  # this one
    assert found["dinoscope_ready", ()] == 1
    assert found["dinoscope_model_info", ("fake/4", "f" * 16, "fake")] == 1
    received = "dinoscope_http_received_bytes_total", ()
    assert found[received] - before[received] > 3 * 100


async def test_metrics_of_collections(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.collectors.MOST_COLLECTIONS", 2)
    monkeypatch.setattr("service.collectors._FRESH_S", 0.0)
    for name in ("a", "b", "c"):
        json_of(await client.put(f"/v1/collections/{name}"), 201)
        for seed in range(2):
            upload = {"image": ("a.png", png(seed))}
            json_of(await client.post(f"/v1/collections/{name}/images", files=upload))
    found = await samples(client)
    assert found["dinoscope_collections", ()] == 4
    assert found["dinoscope_collections_damaged", ()] == 0
    assert found["dinoscope_collection_records", ("a",)] == 2
    assert found["dinoscope_collection_records", ("(others)",)] == 2  # c's, and default's none
    assert found["dinoscope_collection_disk_bytes", ("a",)] > 1000
    assert found["dinoscope_collection_memory_bytes", ("(others)",)] > 0
    assert found["dinoscope_index_rows", ("b", "copy")] == 2
    assert found["dinoscope_index_kind", ("b", "flat", "cls")] == 1
    assert not [labels for _, labels in found if "c" in labels or "default" in labels]


async def test_rejections_are_counted_by_their_reason(serve: Serve, encoder: FakeEncoder) -> None:
    async with serve(max_requests=1) as client:
        with encoder.busy() as model:
            body = {"input": data_uri(png(1))}
            first = asyncio.ensure_future(client.post("/v1/embeddings", json=body))
            await asyncio.to_thread(model.wait_until_reached)
            error_of(await client.post("/v1/embeddings", json=body), 429)
            model.open()
            json_of(await first)
        found = await samples(client)
        assert found["dinoscope_rejections_total", ("too_many_requests",)] == 1


async def test_open_metrics_where_asked_for(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


async def test_the_page_of_metrics_lists_them_all(client: httpx.AsyncClient) -> None:
    json_of(await client.post("/v1/embeddings", json={"input": data_uri(png(1))}))
    metrics: Metrics = client._transport.app.state.metrics
    known = {
        family.name: family
        for family in metrics.registry.collect()
        if family.name.startswith("dinoscope_")
    }
    rows = re.findall(r"^\| `(dinoscope_\w+)` \| (\w+) \|([^|]*)\|", DOCS.read_text(), re.M)
    listed = {name.removesuffix("_total").removesuffix("_info"): kind for name, kind, _ in rows}
    assert listed == {name: family.type for name, family in known.items()}
    labels = {
        name.removesuffix("_total").removesuffix("_info"): set(re.findall(r"`(\w+)`", text))
        for name, _, text in rows
    }
    for name, family in known.items():
        used = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert used <= labels[name], name
    drawn = set(re.findall(r"dinoscope_\w+", DASHBOARD.read_text())) - {"dinoscope_"}
    samples_known = {
        f"{name}{end}" for name in known for end in ("", "_total", "_sum", "_count", "_bucket")
    }
    assert drawn <= samples_known


def test_a_record_as_json_and_as_text() -> None:
    try:
        raise ValueError("why\nnot")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("a", logging.ERROR, "f.py", 1, "two %s", ("lines\n2",), info)
    record.fields = {"route": "/a", "status": None}
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("error", "a", "two lines\n2")
    assert (line["route"], line["status"]) == ("/a", None)
    assert line["traceback"].endswith("ValueError: why\nnot")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    first = TextFormatter("%(levelname)s %(message)s").format(record).splitlines()
    assert first[1] == "2 route=/a"
