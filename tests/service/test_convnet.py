"""Networks without attention, and of other channels: from the artifact to the answers."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.preprocess import Preprocess
from backbone.pretrained import load_model
from service.app import create_app
from service.encoder import TorchEncoder
from service.settings import Settings
from tests.service.answers import error_of, json_of
from tests.service.pictures import data_uri, encoded, noise, opened, png

pytestmark = pytest.mark.anyio
RAW = {"Content-Type": "image/png"}
CONVNET = Architecture(name="mobilenet_v3_small", image_size=32)  # embeddings 1024, tokens 576


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written(architecture: Architecture, path: Path) -> Path:
    """An artifact with random weights that are large enough to tell pictures apart."""
    torch.manual_seed(0)
    network = architecture.build().train()
    for weights in network.parameters():
        if architecture.has_attention:
            weights.data += 0.05 * torch.randn_like(weights)
        elif weights.ndim > 1:
            weights.data.normal_(std=2 / weights[0].numel() ** 0.5)
    with torch.no_grad():
        for _ in range(8):  # statistics for a BatchNorm
            coarse = torch.randn(16, architecture.in_channels, 4, 4)
            network(F.interpolate(coarse, size=(32, 32), mode="bicubic"))
    preprocess = Preprocess.in_proportion(
        32, patch_size=architecture.patch_size, channels=architecture.in_channels
    )
    artifact = Artifact(
        architecture=architecture, preprocess=preprocess, weights=network.state_dict()
    )
    write_artifact(artifact, path)
    return path


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A service of its own for the model at `path`, through the settings as an operator has it."""
    settings = Settings(
        _env_file=None, model=str(path), device="cpu", data_dir=path.parent / "collections"
    )
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(CONVNET, tmp_path_factory.mktemp("convnet") / "mobile.safetensors")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def client(model: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(model) as opened_client:
        yield opened_client


async def embedding(client: httpx.AsyncClient, content: bytes, **options: Any) -> Any:
    response = await client.post("/v1/embeddings", content=content, headers=RAW, params=options)
    return np.array(json_of(response)["data"][0]["embedding"])


async def test_the_model_tells_what_it_is(client: httpx.AsyncClient) -> None:
    (card,) = json_of(await client.get("/v1/models"))["data"]
    assert card["architecture"] == "mobilenet_v3_small"
    assert (card["embedding_size"], card["copy_embedding_size"]) == (1024, 1024 + 576)
    assert (card["heads"], card["patch_size"], card["input_size"]) == (0, None, 32)
    assert card["picture_mode"] == "RGB"


async def test_embeddings_are_the_networks(client: httpx.AsyncClient, model: Path) -> None:
    artifact = load_model(str(model)).artifact
    with torch.no_grad():
        view = artifact.preprocess.centre_crop(noise(1, (50, 40)))
        expected = artifact.network()(view[None]).cls[0].numpy()
    found = await embedding(client, png(1, (50, 40)), normalize=False)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.linalg.norm(await embedding(client, png(1))) == pytest.approx(1.0)


async def test_search_classify_and_copies(client: httpx.AsyncClient) -> None:
    base = "/v1/collections/default"
    for seed in range(4):
        body = {"image": data_uri(png(seed)), "id": f"p{seed}", "metadata": {"kind": seed % 2}}
        json_of(await client.post(f"{base}/images", json={"images": [body]}))
    for path in ("search", "copies"):
        answer = json_of(await client.post(f"{base}/{path}", content=png(2), headers=RAW))
        best = answer["matches"][0]
        assert (best["id"], best["score"]) == ("p2", pytest.approx(1.0, abs=1e-4))
        assert len(answer["matches"]) == 4
    options = {"label": "kind", "k": 1}
    response = await client.post(f"{base}/classify", content=png(3), headers=RAW, params=options)
    assert json_of(response)["labels"] == [{"label": 1, "probability": 1.0}]
    copy = await embedding(client, png(1), feature="copy")
    assert copy.shape == (1024 + 576,)


async def test_attention_is_refused_with_the_reason(client: httpx.AsyncClient) -> None:
    body = {"image": data_uri(png(1))}
    for response in (
        await client.post("/v1/attention", content=png(1), headers=RAW),
        await client.post("/v1/attention", json=body),
        await client.post("/v1/attention", json={**body, "head": "all"}),
    ):
        error = error_of(response, 400, "attention_unavailable")
        assert "mobilenet_v3_small" in error["message"]
        assert "no attention" in error["message"]


async def test_features_without_blocks(client: httpx.AsyncClient, model: Path) -> None:
    (card,) = json_of(await client.get("/v1/models"))["data"]
    assert card["features"] == {
        "cls": 1024, "cls+mean": 1600, "patches": 576, "copy": 1600
    }  # fmt: skip
    assert card["blocks"] == 0
    for feature, length in card["features"].items():
        found = await embedding(client, png(1), feature=feature)
        assert found.shape[-1] == length
    response = await client.post(
        "/v1/embeddings", content=png(1), headers=RAW, params={"feature": "last4"}
    )
    error = error_of(response, 400, "feature_unavailable")
    assert error["param"] == "feature"
    for part in ("last4", "mobilenet_v3_small", "convolutional", "cls+mean"):
        assert part in error["message"]


async def test_maps_of_the_last_feature_map(client: httpx.AsyncClient) -> None:
    for options, count in (({"view": "pca"}, 3), ({"view": "similarity", "point": "0.5,0.5"}, 1)):
        response = await client.post(
            "/v1/attention", content=png(1, (48, 24)), headers=RAW, params=options
        )
        assert opened(response.content).size == (48, 24)
        response = await client.post(
            "/v1/attention",
            content=png(1, (48, 24)),
            headers=RAW,
            params={**options, "format": "json"},
        )
        maps = np.array(json_of(response)["maps"])
        assert maps.shape[0] == count
        assert np.isfinite(maps).all()


async def test_a_model_of_grey_pictures(tmp_path: Path) -> None:
    described = Architecture(name="vit_tiny", patch_size=16, image_size=32, in_channels=1)
    async with served(written(described, tmp_path / "grey.safetensors")) as client:
        (card,) = json_of(await client.get("/v1/models"))["data"]
        assert card["picture_mode"] == "L"
        colour = noise(1, (48, 48))
        of_colour = await embedding(client, encoded(colour))
        of_grey = await embedding(client, encoded(colour.convert("L")))
        assert np.allclose(of_colour, of_grey, atol=1e-5)
        assert not np.allclose(of_colour, await embedding(client, png(2, (48, 48))), atol=1e-2)
        response = await client.post(
            "/v1/attention?overlay=0", content=encoded(colour), headers=RAW
        )
        assert np.array_equal(np.asarray(opened(response.content)), np.asarray(colour))


async def test_a_model_of_transparent_pictures(tmp_path: Path) -> None:
    described = Architecture(name="vit_tiny", patch_size=16, image_size=32, in_channels=4)
    async with served(written(described, tmp_path / "rgba.safetensors")) as client:
        (card,) = json_of(await client.get("/v1/models"))["data"]
        assert card["picture_mode"] == "RGBA"
        opaque = noise(1, (48, 48))
        clear = opaque.convert("RGBA")
        clear.putalpha(Image.linear_gradient("L").resize((48, 48)))
        of_opaque = await embedding(client, encoded(opaque))
        full = await embedding(client, encoded(opaque.convert("RGBA")))
        assert np.allclose(of_opaque, full, atol=1e-5)
        assert not np.allclose(of_opaque, await embedding(client, encoded(clear)), atol=1e-2)

        # What people see has no transparency: maps and thumbnails lie over white.
        response = await client.post("/v1/attention?overlay=0", content=encoded(clear), headers=RAW)
        white = Image.new("RGBA", (48, 48), (255, 255, 255, 255))
        flat = Image.alpha_composite(white, clear).convert("RGB")
        assert np.array_equal(np.asarray(opened(response.content)), np.asarray(flat))
        images = "/v1/collections/default/images"
        stored = json_of(await client.post(images, content=encoded(clear), headers=RAW))
        (image,) = stored["images"]
        assert image["outcome"] == "created"
        thumbnail = await client.get(f"/v1/collections/default/thumbnails/{image['id']}")
        assert opened(thumbnail.content).mode == "RGB"


def test_other_channels_are_refused_before_the_service_starts(tmp_path: Path) -> None:
    described = Architecture(name="vit_tiny", patch_size=16, image_size=32, in_channels=5)
    model = load_model(str(written(described, tmp_path / "five.safetensors")))
    with pytest.raises(ValueError, match=r"'five' cannot be served: .*5 channels.*1 \(grey\)"):
        TorchEncoder(model, device="cpu")
