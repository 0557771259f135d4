"""What people have: OpenAI's client, curl and httpx, against a service in a process of its own."""

import base64
import io
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import uvicorn
from PIL import Image

from backbone.pretrained import load_model
from service.patch_maps import principal_components, similarity
from service.settings import Settings
from tests.e2e.running import ROOT, running_service
from tests.service.fakes import FakeEncoder, created

PICTURES = ROOT / "docs" / "pictures"
CAT, COFFEE = PICTURES / "chelsea.jpg", PICTURES / "coffee.jpg"
CURL = shutil.which("curl")
needs_curl = pytest.mark.skipif(CURL is None, reason="curl is not on the path")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with the repository's model, which takes one request at a time."""
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder, max_request_images="4", max_requests="1") as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none is needed", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def artifact() -> Any:
    return load_model("default").artifact


def data_uri(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def expected(artifact: Any, path: Path) -> np.ndarray:
    """The unit CLS embedding, by the network itself."""
    with Image.open(path) as picture, torch.no_grad():
        view = artifact.preprocess.centre_crop(picture.convert("RGB"))
        cls = artifact.network()(view[None]).cls[0]
    return np.asarray(cls / cls.norm())


def test_openai_gets_one_embedding(client: openai.OpenAI, artifact: Any) -> None:
    answer = client.embeddings.create(model="default", input=data_uri(CAT))
    assert np.allclose(answer.data[0].embedding, expected(artifact, CAT), atol=1e-5)
    assert (answer.object, answer.model, answer.data[0].index) == ("list", "default", 0)
    assert answer.usage.total_tokens == 0


def test_openai_gets_the_same_as_floats_and_base64(client: openai.OpenAI) -> None:
    pictures = [data_uri(CAT), data_uri(COFFEE)]
    default = client.embeddings.create(model="default", input=pictures)
    floats = client.embeddings.create(model="default", input=pictures, encoding_format="float")
    for one, other in zip(default.data, floats.data, strict=True):
        assert one.index == other.index
        assert np.array_equal(np.float32(one.embedding), np.float32(other.embedding))
    assert not np.allclose(floats.data[0].embedding, floats.data[1].embedding, atol=1e-3)


def test_openai_sends_the_embedding_as_base64_by_default(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(model="default", input=data_uri(CAT))
    packed = json.loads(raw.http_response.read())["data"][0]["embedding"]
    assert len(base64.b64decode(packed)) == 192 * 4


def test_openai_asks_for_features_and_dimensions(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model="default",
        input=data_uri(CAT),
        dimensions=768,
        user="somebody",
        extra_body={"feature": "last4"},
    )
    assert len(answer.data[0].embedding) == 768
    patches = client.embeddings.create(
        model="default", input=data_uri(CAT), extra_body={"feature": "patches"}
    )
    rows, columns = patches.model_extra["grid"]
    grid = np.array(patches.data[0].embedding).reshape(rows, columns, 192)
    assert (rows, columns) == (8, 8)
    assert np.allclose(np.linalg.norm(grid, axis=2), 1.0, atol=1e-5)


def test_openai_lists_the_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("default", "model", "dinoscope")


@pytest.mark.parametrize(
    ("asked", "kind", "code", "param"),
    [
        ({"model": "clip"}, openai.NotFoundError, "model_not_found", "model"),
        ({"dimensions": 64}, openai.BadRequestError, "invalid_dimensions", "dimensions"),
        ({"input": ["no base64!"]}, openai.BadRequestError, "invalid_base64", "input[0]"),
        ({"input": ["AAAA"] * 5}, openai.APIStatusError, "too_many_images", "input"),
        ({"input": [[1, 2]]}, openai.UnprocessableEntityError, "invalid_parameter", "input[0]"),
        ({"input": ["bm8gcGljdHVyZQ=="]}, openai.APIStatusError, "unsupported_image", "input[0]"),
    ],
)
def test_openai_raises_its_own_errors(
    client: openai.OpenAI, asked: dict[str, Any], kind: type[Exception], code: str, param: str
) -> None:
    given: dict[str, Any] = {"model": "default", "input": data_uri(CAT), **asked}
    with pytest.raises(kind) as caught:
        client.embeddings.create(**given)
    error = caught.value
    assert isinstance(error, openai.APIStatusError)
    assert (error.code, error.param) == (code, param)
    assert error.type in ("invalid_request_error", "not_found_error")
    assert param in error.message


@contextmanager
def stalled(url: str) -> Iterator[socket.socket]:
    """A request that was begun and does not go on: it holds the only place."""
    place = httpx.URL(url)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    with socket.create_connection((place.host, place.port)) as begun:
        begun.sendall(head + b"Content-Length: 1000\r\n\r\nbegun")
        for _ in range(600):
            if httpx.post(f"{url}/v1/embeddings", content=b"x").status_code == 429:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the service never counted the request that was begun")
        yield begun


def test_openai_waits_while_the_service_is_full(url: str) -> None:
    """Another request holds the only place until the client was refused once."""
    refused: list[str] = []
    with stalled(url) as begun:

        def on_answer(response: Any) -> None:
            if response.status_code == 429:
                refused.append(response.headers["retry-after"])
                begun.close()

        with openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=5,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [on_answer]}),
        ) as client:
            started = time.monotonic()
            raw = client.embeddings.with_raw_response.create(model="default", input=data_uri(CAT))
            waited_s = time.monotonic() - started
    assert len(raw.parse().data[0].embedding) == 192
    assert refused
    assert set(refused) == {"1"}
    assert raw.retries_taken == len(refused)
    assert waited_s >= len(refused) * 1.0


def test_openai_tells_of_a_full_service(url: str, client: openai.OpenAI) -> None:
    with stalled(url), pytest.raises(openai.RateLimitError) as caught:
        client.embeddings.create(model="default", input=data_uri(CAT))
    assert caught.value.code == "too_many_requests"
    assert caught.value.type == "rate_limit_error"
    assert caught.value.response.headers["retry-after"] == "1"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[tuple[str, FakeEncoder]]:
    """A service in a thread, over real HTTP, whose model fails as it is told."""
    encoder = FakeEncoder()
    app = created(Settings(_env_file=None, data_dir=tmp_path / "data"), encoder)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", encoder
    finally:
        server.should_exit = True
        thread.join()


def test_openai_tries_again_after_a_failure(fake: tuple[str, FakeEncoder]) -> None:
    url, encoder = fake
    encoder.failure = RuntimeError("the model is out of sorts")
    waits: list[str] = []

    def on_answer(response: Any) -> None:
        if response.status_code == 503:
            waits.append(response.headers["retry-after"])
            encoder.failure = None

    hooks = {"response": [on_answer]}
    http_client = openai.DefaultHttpxClient(event_hooks=hooks)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http_client) as client:
        raw = client.embeddings.with_raw_response.create(model="fake", input=data_uri(CAT))
        assert len(raw.parse().data[0].embedding) == 48
        assert (waits, raw.retries_taken) == (["1"], 1)
        encoder.failure = RuntimeError("for good")
        with pytest.raises(openai.InternalServerError) as caught:
            client.with_options(max_retries=0).embeddings.create(
                model="fake", input=data_uri(COFFEE)
            )
    assert caught.value.status_code == 503
    assert caught.value.code == "model_failed"


def curl(*arguments: str, input: bytes | None = None) -> bytes:  # noqa: A002
    assert CURL is not None
    done = subprocess.run(
        [CURL, "--silent", "--show-error", "--fail", *arguments],
        input=input,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@needs_curl
def test_curl_sends_forms_raw_bodies_and_json(url: str, artifact: Any) -> None:
    address = f"{url}/v1/embeddings"
    body = json.dumps({"input": data_uri(CAT)}).encode()
    answers = [
        curl("-F", f"image=@{CAT}", address),
        curl("-H", "Content-Type: image/jpeg", "--data-binary", f"@{CAT}", address),
        curl("-H", "Content-Type: application/json", "-d", "@-", address, input=body),
    ]
    assert answers[0] == answers[1] == answers[2]
    (one,) = json.loads(answers[0])["data"]
    assert np.allclose(one["embedding"], expected(artifact, CAT), atol=1e-5)


@needs_curl
def test_curl_gets_files(url: str, tmp_path: Path) -> None:
    npy, webp = tmp_path / "cats.npy", tmp_path / "map.webp"
    form = ("-F", f"image=@{CAT}", "-F", f"image=@{COFFEE}")
    curl(*form, "-H", "Accept: application/x-npy", "-o", str(npy), f"{url}/v1/embeddings")
    assert np.load(npy, allow_pickle=False).shape == (2, 192)
    curl(
        "-F", f"image=@{CAT}", "-o", str(webp), f"{url}/v1/attention?format=webp&head=all&size=240"
    )  # fmt: skip
    with Image.open(webp) as picture:
        assert picture.format == "WEBP"
        assert picture.width == 3 * 240 + 2 * 4


def ask(url: str, **options: Any) -> np.ndarray:
    """Maps of the cat as numbers, by httpx."""
    response = httpx.post(
        f"{url}/v1/attention",
        content=CAT.read_bytes(),
        headers={"Content-Type": "image/jpeg", "Accept": "application/octet-stream"},
        params=options,
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return np.asarray(np.load(io.BytesIO(response.content), allow_pickle=False))


def test_httpx_gets_maps_that_are_the_networks(url: str, artifact: Any) -> None:
    """Against whole attention and plain formulas over the model in the repository."""
    network, patch = artifact.network(), artifact.architecture.patch_size
    short = round(artifact.preprocess.crop * 480 / 224)
    with Image.open(CAT) as picture, torch.no_grad():
        view = artifact.preprocess.whole(picture.convert("RGB"), short_side=short, multiple=patch)[
            None
        ]
        features = network(view, attention="full")
        h, w = features.grid
        tokens = features.patches[0].reshape(h, w, -1).numpy()
        product = torch.eye(1 + h * w)
        x, _ = network.embed(view)
        flat, groups = x.flatten(0, 1), [(1, 1 + h * w)]
        for block in network.blocks:
            flat, weights = block(flat, groups, (None, None), "full")
            mean = weights[0].mean(dim=0) + torch.eye(1 + h * w)
            product = mean / mean.sum(dim=1, keepdim=True) @ product
    whole = features.attention[0].numpy()
    query = 1 + (h // 4) * w + w // 2  # the patch at half of the width, a quarter of the height
    point = f"{(w // 2 + 0.5) / w:.4f},{(h // 4 + 0.5) / h:.4f}"
    ask_finely = partial(ask, url, resolution=short)
    for options, row in (
        ({"head": "all"}, whole[:, 0]),
        ({"head": "max"}, whole[:, 0].max(axis=0, keepdims=True)),
        ({"head": "all", "point": point}, whole[:, query]),
        ({"rollout": "true"}, product[:1].numpy()),
        ({"rollout": "true", "point": point}, product[query : query + 1].numpy()),
    ):
        assert np.allclose(ask_finely(**options), row[:, 1:].reshape(-1, h, w), atol=1e-5), options
    likeness = similarity(tokens, ((w // 2 + 0.5) / w, (h // 4 + 0.5) / h))
    assert np.allclose(ask_finely(view="similarity", point=point), likeness, atol=1e-4)
    components = ask_finely(view="pca")
    assert np.allclose(components, principal_components(tokens), atol=1e-2)
    assert np.array_equal(components, ask_finely(view="pca"))
    assert not np.allclose(ask(url, block=3), ask(url, block=-1), atol=1e-4)


def test_httpx_streams_a_form_of_files(url: str) -> None:
    with CAT.open("rb") as one, COFFEE.open("rb") as two:
        files = [("image", ("1.jpg", one)), ("image", ("2.jpg", two))]
        response = httpx.post(f"{url}/v1/embeddings", files=files, params={"feature": "cls+mean"})
    assert [len(one["embedding"]) for one in response.json()["data"]] == [384, 384]
