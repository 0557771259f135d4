"""The encoder of a real network, tiny and untrained."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.architectures import Architecture
from backbone.attention import rollout
from backbone.descriptors import copy_descriptor
from backbone.preprocess import LONGEST, Preprocess
from backbone.pretrained import NamedModel, load_model
from backbone.vit import Block
from service import precision
from service.encoder import FEATURES, AttentionTask, Task, TokensTask, TorchEncoder
from service.model_batches import batch_kind
from service.patch_maps import patch_at
from service.precision import Precision, in_precision
from tests.service.pictures import RED, noise, plain
from tests.service.tiny_network import write_tiny_network

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
TASKS: tuple[Task, ...] = (
    *FEATURES,
    TokensTask(),
    AttentionTask(block=11),
    AttentionTask(block=0, point=(0.9, 0.1)),
    AttentionTask(block=None),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NamedModel:
    return write_tiny_network(tmp_path_factory.mktemp("model") / "tiny.safetensors")


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


def test_features_are_the_networks(encoder: TorchEncoder, model: NamedModel) -> None:
    picture, network = noise(1, (50, 40)), model.artifact.network()
    with torch.no_grad():
        view = model.artifact.preprocess.centre_crop(picture)[None]
        features = network(view, last_blocks=4)
    expected = {
        "last4": torch.cat([block[0, 0] for block in features.blocks]),
        "cls+mean": torch.cat([features.cls[0], features.patches[0].mean(dim=0)]),
        "patches": features.patches[0].reshape(2, 2, 192),
    }
    assert encoder.info.features == {
        "cls": 192, "last4": 768, "cls+mean": 384, "patches": 192, "copy": 384
    }  # fmt: skip
    for name in FEATURES:
        (found,) = encoder.run(name, [encoder.prepare(name, picture)])
        assert found.shape[-1] == encoder.info.features[name]
        assert found.dtype == np.float32
        if name in expected:
            assert np.allclose(found, expected[name], atol=1e-5)


def test_tokens_are_those_of_the_whole_picture(encoder: TorchEncoder, model: NamedModel) -> None:
    prepared = encoder.prepare(TokensTask(), noise(2, (60, 40)))
    (tokens,) = encoder.run(TokensTask(), [prepared])
    with torch.no_grad():
        features = model.artifact.network()(torch.from_numpy(prepared)[None])
    assert tokens.shape == (*features.grid, 192)
    assert np.allclose(tokens.reshape(-1, 192), features.patches[0], atol=1e-5)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (48, 48)])
def test_maps_are_the_cls_row_without_cls(
    encoder: TorchEncoder, model: NamedModel, size: tuple[int, int]
) -> None:
    task = AttentionTask(block=11, resolution=69)
    prepared = encoder.prepare(task, noise(2, size))
    (maps,) = encoder.run(task, [prepared])
    rows, columns = prepared.shape[1] // 16, prepared.shape[2] // 16
    assert maps.shape == (3, rows, columns)
    assert min(rows, columns) == round(69 / 16)
    assert (columns > rows, columns < rows) == (size[0] > size[1], size[0] < size[1])
    full = model.artifact.network()(torch.from_numpy(prepared)[None], attention="full").attention
    assert full is not None
    assert np.allclose(maps, full[0, :, 0, 1:].reshape(maps.shape), atol=1e-5)
    for point in ((0.0, 0.0), (0.7, 0.2), (1.0, 1.0)):
        task = AttentionTask(block=11, point=point)
        (maps,) = encoder.run(task, [prepared])
        row, column = patch_at(point, (rows, columns))
        expected = full[0, :, 1 + row * columns + column, 1:].reshape(maps.shape)
        assert np.allclose(maps, expected, atol=1e-5)


def test_rollout_is_of_all_blocks(encoder: TorchEncoder, model: NamedModel) -> None:
    task = AttentionTask(block=None)
    prepared = encoder.prepare(task, noise(2, (60, 40)))
    (maps,) = encoder.run(task, [prepared])
    with torch.no_grad():
        expected = rollout(model.artifact.network(), torch.from_numpy(prepared)[None])
    assert np.allclose(maps.ravel(), expected[0, 1:], atol=1e-6)
    assert maps.shape[0] == 1


def test_tasks_are_keys() -> None:
    assert len({AttentionTask(block=1), AttentionTask(block=1), AttentionTask(block=2)}) == 2
    assert {str(task) for task in TASKS} == {*FEATURES, "tokens", "attention"}


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_its_pictures_one_by_one(encoder: TorchEncoder, task: Task) -> None:
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


@pytest.mark.parametrize(
    ("size", "seen"),
    [((60, 60), (128, 128)), ((60, 30), (192, 96)), ((10, 99), (64, 256)), ((99, 10), (256, 64))],
)
def test_whole_pictures_have_about_as_many_pixels_as_embeddings(
    model: NamedModel, size: tuple[int, int], seen: tuple[int, int]
) -> None:
    larger = replace(model.artifact, preprocess=Preprocess.in_proportion(128, patch_size=16))
    encoder = TorchEncoder(replace(model, artifact=larger), device="cpu")
    for task in (TokensTask(), AttentionTask(block=0)):
        assert encoder.prepare(task, noise(1, size)).shape == (3, *reversed(seen))
        assert encoder.needed(task, size) == (3 * seen[0], 3 * seen[1])


def test_resolution(model: NamedModel) -> None:
    encoder = TorchEncoder(model, device="cpu", max_resolution=128)
    assert encoder.info.max_resolution == 128
    for task in (TokensTask(resolution=128), AttentionTask(block=0, resolution=128)):
        assert encoder.prepare(task, noise(1, (60, 30))).shape == (3, 128, 256)
    usual = TorchEncoder(model, device="cpu").info
    assert usual.max_resolution == round(32 * 480 / 224)
    assert encoder.info.tasks == usual.tasks  # the start takes no longer
    assert TorchEncoder(model, device="cpu", max_resolution=16).info.tasks[-1] == AttentionTask(
        block=11, resolution=16
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(model: NamedModel) -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        TorchEncoder(model, device="cuda")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("in_one_call", "few", "threads"),
    [(False, 128, 1), (True, 128, 1), (True, 5, 1), (True, 128, 2)],
)
def test_fp32_is_exact(
    model: NamedModel,
    task: Task,
    in_one_call: bool,
    few: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed layers, blocks as one call and parts of a batch round differently, and no more."""
    monkeypatch.setattr(precision, "_is_as_fast", lambda *_: in_one_call)
    monkeypatch.setattr(precision, "_FEW_TOKENS", few)
    fast = TorchEncoder(model, device="cpu", threads=threads)
    kinds = {type(module) for module in fast._network.modules()}
    assert (precision._WholeBlock in kinds) == in_one_call
    plain_one = TorchEncoder(model, device="cpu", threads=1)
    plain_one._network = model.artifact.network()
    batch = [fast.prepare(task, noise(seed, (48, 48))) for seed in range(3)]
    found, expected = fast.run(task, batch), plain_one.run(task, batch)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("cls_only", [True, False])
def test_a_block_in_one_call_is_the_block(has_bias: bool, cls_only: bool) -> None:
    torch.manual_seed(0)
    block = Block(96, 3, 4.0, has_bias, 0.0).eval()
    for weights in block.parameters():
        weights.data += 0.1 * torch.randn_like(weights)
    x, rest = torch.randn(4 * 17, 96), ([(4, 17)], (None, None), "none", cls_only)

    with torch.inference_mode():
        expected, found = block(x, *rest)[0], precision._WholeBlock(block)(x, *rest)[0]

        whole = precision._WholeBlock(block)
        further = whole(found, *rest)[0] if not cls_only else whole(x.reshape(4, 17, 96), *rest)[0]

    assert found.shape == ((4, 96) if cls_only else (4, 17, 96))
    assert torch.allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        again = block(expected, *rest)[0] if not cls_only else expected
    assert torch.allclose(further.reshape(again.shape), again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("task", TASKS)
def test_other_precisions_are_near_and_have_a_fingerprint_of_their_own(
    encoder: TorchEncoder, model: NamedModel, precision: Precision, task: Task
) -> None:
    other = TorchEncoder(model, device="cpu", precision=precision)
    assert other.info.fingerprint == f"{encoder.info.fingerprint}-{precision}"
    batch = [encoder.prepare(task, noise(seed, (48, 48))) for seed in range(3)]
    for exact, found in zip(encoder.run(task, batch), other.run(task, batch), strict=True):
        one, two = exact.ravel(), found.ravel()
        assert found.dtype == np.float32
        assert not np.array_equal(one, two)
        # These weights are noise, which rounding disturbs more than a trained network.
        least = {"bf16": 0.999, "int8": 0.98}[precision]
        assert one @ two / np.linalg.norm(one) / np.linalg.norm(two) > least


def test_int8_layers_are_first_given_a_shape_that_no_batch_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """See `_Int8Linear`: calls of the first shape would disturb each other, but seldom."""
    shapes: list[torch.Size] = []
    forward = precision._Int8Linear.forward

    def noted(self: precision._Int8Linear, x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(precision._Int8Linear, "forward", noted)
    precision._Int8Linear(torch.nn.Linear(8, 4))
    assert shapes == [(precision._NOBODYS_ROWS, 8)]
    grids = ((h, w) for h in range(1, 200) for w in range(h, int(LONGEST * h) + 1))
    tokens = {1 + h * w for h, w in grids}
    divisors = [n for n in range(2, 984) if precision._NOBODYS_ROWS % n == 0]
    assert not tokens.intersection(divisors)


def test_int8_batches_do_not_disturb_each_other(model: NamedModel) -> None:
    encoder = TorchEncoder(model, device="cpu", precision="int8", threads=2)
    batches = [[encoder.prepare("cls", noise(seed + i)) for i in range(4)] for seed in (0, 4)]
    expected = [encoder.run("cls", batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(60):
            found = list(pool.map(partial(encoder.run, "cls", at_once=2), batches))
            assert np.array_equal(found, expected)


def test_few_pictures_of_many_tokens_are_enough(model: NamedModel) -> None:
    encoder = TorchEncoder(model, device="cpu")
    patch = model.artifact.architecture.patch_size
    for columns, rows in ((1, 1), (2, 3), (40, 40)):
        shape = (3, rows * patch, columns * patch)
        assert encoder.enough(shape) == math.ceil(512 / (rows * columns + 1))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="real pictures are not there")
def test_int8_of_the_model_in_the_repository() -> None:
    model = load_model("default")
    exact, int8 = (TorchEncoder(model, device="cpu", precision=p) for p in ("fp32", "int8"))
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))[::25]]
    batch = [exact.prepare("cls", photo) for photo in photos]
    one, two = (np.stack(encoder.run("cls", batch)) for encoder in (exact, int8))
    cosines = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    assert cosines.mean() >= 0.999


def test_batches_of_a_compiled_network_are_filled_up(model: NamedModel) -> None:
    encoder = TorchEncoder(model, device="cpu", compiled=True)
    assert encoder.batch_sizes(12) == [1, 2, 4, 8, 16]
    shapes: list[int] = []

    def forward(pictures: torch.Tensor, **_: object) -> object:
        shapes.append(len(pictures))
        return network(pictures)

    network = model.artifact.network()
    encoder._network.forward = forward
    encoder._network._compiled_call_impl = None  # to be eager: compiling takes a minute here
    results = encoder.run("cls", [encoder.prepare("cls", noise(seed)) for seed in range(3)])
    assert shapes == [4]
    assert len(results) == 3


@pytest.mark.parametrize("name", ["resnet18"])
def test_int8_is_for_vits_alone(name: str) -> None:
    network = Architecture(name=name, image_size=32).build()
    with pytest.raises(ValueError, match="for ViTs alone"):
        in_precision(network, "int8", torch.device("cpu"))
