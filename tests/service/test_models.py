"""Several models at once: chosen by name, and by the collection that is asked."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.preprocess import Preprocess
from service.app import create_app
from service.encoder import Encoder
from service.errors import RequestError
from service.loading import find_models, make_model, share
from service.metrics import Metrics
from service.models import Models
from service.settings import Settings
from tests.service.answers import error_of, json_of
from tests.service.conftest import Serve
from tests.service.fakes import FakeEncoder, models_of
from tests.service.pictures import data_uri, png

pytestmark = pytest.mark.anyio
EMBEDDINGS, COLLECTIONS = "/v1/embeddings", "/v1/collections"
RAW = {"Content-Type": "image/png"}


@pytest.fixture
def other() -> FakeEncoder:
    return FakeEncoder("other", "e" * 16)


async def test_a_request_chooses_its_model(
    serve: Serve, encoder: FakeEncoder, other: FakeEncoder
) -> None:
    async with serve(others=[other], cache_bytes=0) as client:
        other.calls.clear()
        listed = json_of(await client.get("/v1/models"))["data"]
        assert [model["id"] for model in listed] == ["fake", "other"]
        for chosen, name in (
            ({}, "fake"),
            ({"model": "other"}, "other"),
            ({"model": "fake"}, "fake"),
        ):
            body = {"input": data_uri(png(1)), **chosen}
            assert json_of(await client.post(EMBEDDINGS, json=body))["model"] == name
            answer = await client.post(EMBEDDINGS, content=png(2), headers=RAW, params=chosen)
            assert json_of(answer)["model"] == name
        assert (len(encoder.calls), len(other.calls)) == (4, 2)
        answer = await client.post(
            "/v1/attention",
            json={"image": data_uri(png(1)), "model": "other"},
            headers={"Accept": "application/json"},
        )
        assert json_of(answer)["model"] == "other"
        assert (str(other.calls[-1][0]), other.calls[-1][1]) == ("attention", 1)
        error = error_of(
            await client.post(EMBEDDINGS, json={"input": data_uri(png(1)), "model": "third"}), 404
        )
        assert error["param"] == "model"
        assert "'fake', 'other'" in error["message"]


async def test_a_collection_keeps_its_model(serve: Serve, other: FakeEncoder) -> None:
    async with serve(others=[other], cache_bytes=0) as client:
        made = json_of(await client.put(f"{COLLECTIONS}/c", json={"model": "other"}), 201)
        assert made["model"] == other.info.fingerprint
        other.calls.clear()
        for path in ("images", "search", "copies", "classify?label=x"):
            await client.post(f"{COLLECTIONS}/c/{path}", content=png(1), headers=RAW)
        assert sorted(str(task) for task, _ in other.calls) == ["cls", "cls", "cls", "copy", "copy"]
        again = await client.put(f"{COLLECTIONS}/c", json={"model": "fake"})
        assert "'other', not of 'fake'" in error_of(again, 409, "model_mismatch")["message"]
        assert json_of(await client.put(f"{COLLECTIONS}/c"))["model"] == other.info.fingerprint
        unknown = await client.put(f"{COLLECTIONS}/d", json={"model": "third"})
        error_of(unknown, 404, "model_not_found")
    async with serve() as client:  # the other one is served no more
        lost = await client.post(f"{COLLECTIONS}/c/search", content=png(1), headers=RAW)
        assert "DINOSCOPE_MODELS" in error_of(lost, 409, "model_mismatch")["message"]


@pytest.mark.parametrize("load_models", ["start", "lazy"])
async def test_when_models_are_loaded(load_models: Any, tmp_path: Path) -> None:
    settings = Settings(_env_file=None, load_models=load_models, data_dir=tmp_path)
    loaded = list[str]()

    def model(encoder: FakeEncoder) -> Any:
        def build() -> Encoder:
            loaded.append(encoder.info.name)
            return encoder

        return make_model(encoder.info, build, settings, shared)

    shared = share(settings, Metrics())
    models = Models(
        [model(FakeEncoder(name, name)) for name in ("one", "two", "three")], pool=shared.pool
    )
    app = create_app(settings, find=lambda settings, metrics: models)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
    ):
        assert loaded == (["one"] if load_models == "lazy" else ["one", "two", "three"])
        for _ in range(2):
            body = {"input": data_uri(png(1)), "model": "three"}
            json_of(await client.post(EMBEDDINGS, json=body))
        if load_models == "lazy":
            assert loaded == ["one", "three"]
        json_of(await client.get("/readyz"))
    with pytest.raises(RequestError, match="stopping"):
        models.vision("two")


def test_models_of_one_name_or_the_same_weights_are_refused() -> None:
    settings = Settings(_env_file=None)

    def models(*infos: tuple[str, str]) -> Models:
        return models_of(settings, Metrics(), *(FakeEncoder(*info) for info in infos))

    with pytest.raises(ValueError, match="two models are named 'a'"):
        models(("a", "1"), ("b", "2"), ("a", "3"))
    with pytest.raises(ValueError, match="'a' and 'c' are the same weights"):
        models(("a", "1"), ("b", "2"), ("c", "1"))


def test_settings_name_several_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    architecture = Architecture(name="vit_tiny", patch_size=16, image_size=32)
    path = tmp_path / "a=b.safetensors"
    write_artifact(
        Artifact(
            architecture=architecture,
            preprocess=Preprocess.in_proportion(32, patch_size=16),
            weights=architecture.build().state_dict(),
        ),
        path,
    )
    monkeypatch.setenv("DINOSCOPE_MODELS", f" mine={path} ,")
    settings = Settings(_env_file=None)
    assert settings.models == (f"mine={path}",)
    models = find_models(settings, Metrics())
    assert [info.name for info in models.infos] == ["default", "mine"]
    assert models.info("mine").architecture == "vit_tiny/16"
    assert models.loaded == []
    own = find_models(Settings(_env_file=None, model=str(path), models=("default",)), Metrics())
    assert [info.name for info in own.infos] == ["a=b", "default"]
