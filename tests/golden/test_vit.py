import pytest
import torch

from backbone.descriptors import copy_descriptor, mass_mask, multiscale
from backbone.vit import VisionTransformer
from tests.golden.conftest import Golden

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def tensors(golden: Golden) -> dict[str, torch.Tensor]:
    return golden.tensors("vit")


@pytest.fixture(scope="module")
def network(golden: Golden, tensors: dict[str, torch.Tensor]) -> VisionTransformer:
    settings = golden["vit"]
    names = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    network = VisionTransformer(**{name: settings[name] for name in names})
    prefix = "state."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return network.eval()


def each_input(golden: Golden) -> range:
    return range(golden["vit"]["inputs"])


@torch.no_grad()
def test_cls_and_intermediate_tokens(golden, tensors, network) -> None:
    last = golden["vit"]["last_blocks"]
    for i in each_input(golden):
        features = network(tensors[f"input.{i}"], last_blocks=last)
        torch.testing.assert_close(features.cls, tensors[f"cls.{i}"], **TOLERANCE)
        for j in range(last):
            torch.testing.assert_close(
                features.blocks[j], tensors[f"tokens_last3.{i}.{j}"], **TOLERANCE
            )


@torch.no_grad()
def test_attention_whole_and_cls_row(golden, tensors, network) -> None:
    for i in each_input(golden):
        expected = tensors[f"attention.{i}"]
        whole = network(tensors[f"input.{i}"], attention="full").attention
        row = network(tensors[f"input.{i}"], attention="cls").attention
        torch.testing.assert_close(whole, expected, **TOLERANCE)
        torch.testing.assert_close(row, expected[:, :, 0], **TOLERANCE)


@torch.no_grad()
def test_copy_descriptor(golden, tensors, network) -> None:
    for i in each_input(golden):
        descriptor = copy_descriptor(network(tensors[f"input.{i}"]), p=golden["vit"]["gem_p"])
        torch.testing.assert_close(descriptor, tensors[f"copy_descriptor.{i}"], **TOLERANCE)


@torch.no_grad()
def test_multiscale(golden, tensors, network) -> None:
    compared = 0
    for i in each_input(golden):
        if f"multiscale.{i}" not in tensors:
            continue  # the smallest scale holds no patch
        vector = multiscale(network, tensors[f"input.{i}"][:1])
        torch.testing.assert_close(vector, tensors[f"multiscale.{i}"], **TOLERANCE)
        compared += 1
    assert compared


@torch.no_grad()
def test_mass_masks(golden, tensors, network) -> None:
    patch = golden["vit"]["patch_size"]
    for i in each_input(golden):
        pictures = tensors[f"input.{i}"]
        h, w = (side // patch for side in pictures.shape[-2:])
        row = network(pictures[:1], attention="cls").attention[0, :, 1:]
        for kept in golden["vit"]["mass_kept"]:
            mask = mass_mask(row, kept).reshape(-1, h, w)
            assert torch.equal(mask, tensors[f"mask_{kept}.{i}"].bool())
