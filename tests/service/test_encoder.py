"""The encoder of a real network, tiny and untrained."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.descriptors import copy_descriptor
from backbone.preprocess import Preprocess
from backbone.pretrained import NamedModel, load_model
from service.encoder import TASKS, TorchEncoder, batch_kind
from tests.service.pictures import RED, noise, plain

ARCHITECTURE = Architecture(name="vit_tiny", patch_size=16, image_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NamedModel:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    torch.manual_seed(0)
    network = ARCHITECTURE.build()
    for weights in network.parameters():  # away from the small values that it starts from
        weights.data += 0.05 * torch.randn_like(weights)
    write_artifact(
        Artifact(
            architecture=ARCHITECTURE,
            preprocess=Preprocess.in_proportion(32, patch_size=16),
            weights=network.state_dict(),
            provenance={"licence": "CC0-1.0"},
        ),
        path,
    )
    return load_model(str(path))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So little work is done faster by one thread than by several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder(model: NamedModel) -> TorchEncoder:
    return TorchEncoder(model, device="cpu")


def test_what_is_said_of_the_model(encoder: TorchEncoder, model: NamedModel) -> None:
    info = encoder.info
    assert (info.name, info.fingerprint) == (model.name, model.artifact.fingerprint)
    assert info.architecture == "vit_tiny/16"
    assert (info.embedding_size, info.input_size, info.patch_size, info.heads) == (192, 32, 16, 3)
    assert info.licence == "CC0-1.0"


def test_vectors_are_the_networks(encoder: TorchEncoder, model: NamedModel) -> None:
    picture, network = noise(1, (50, 40)), model.artifact.network()
    preprocess = model.artifact.preprocess
    cropped = network(preprocess.centre_crop(picture)[None])
    squashed = network(preprocess.squash(picture, multiple=16)[None])
    (cls,) = encoder.run("cls", [encoder.prepare("cls", picture)])
    (copy,) = encoder.run("copy", [encoder.prepare("copy", picture)])
    assert (cls.dtype, cls.shape, copy.dtype, copy.shape) == (
        np.float32,
        (192,),
        np.float32,
        (384,),
    )
    assert np.allclose(cls, cropped.cls[0], atol=1e-5)
    assert np.allclose(copy, copy_descriptor(squashed)[0], atol=1e-5)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (48, 48)])
def test_maps_are_the_cls_row_without_cls(
    encoder: TorchEncoder, model: NamedModel, size: tuple[int, int]
) -> None:
    prepared = encoder.prepare("attention", noise(2, size))
    (maps,) = encoder.run("attention", [prepared])
    rows, columns = prepared.shape[1] // 16, prepared.shape[2] // 16
    assert maps.shape == (3, rows, columns)
    assert min(rows, columns) == round(32 * 480 / 224 / 16)
    assert (columns > rows, columns < rows) == (size[0] > size[1], size[0] < size[1])
    full = model.artifact.network()(torch.from_numpy(prepared)[None], attention="full").attention
    assert full is not None
    assert np.allclose(maps, full[0, :, 0, 1:].reshape(maps.shape), atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_its_pictures_one_by_one(encoder: TorchEncoder, task: str) -> None:
    inputs = [encoder.prepare(task, noise(seed, (48, 36))) for seed in range(3)]
    assert len({batch_kind(task, one) for one in inputs}) == 1
    together = encoder.run(task, inputs)
    assert len(together) == 3
    for one, result in zip(inputs, together, strict=True):
        (alone,) = encoder.run(task, [one])
        assert np.allclose(result, alone, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_odd_sizes(encoder: TorchEncoder, size: tuple[int, int]) -> None:
    for task in TASKS:
        (result,) = encoder.run(task, [encoder.prepare(task, plain(RED, size))])
        assert np.isfinite(result).all()


def test_attention_pixels(model: NamedModel) -> None:
    encoder = TorchEncoder(model, device="cpu", attention_pixels=128)
    assert encoder.prepare("attention", noise(1, (60, 30))).shape == (3, 128, 256)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(model: NamedModel) -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        TorchEncoder(model, device="cuda")
