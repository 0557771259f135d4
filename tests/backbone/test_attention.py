"""Rows of attention and roll-out against the whole T x T weights, in plain formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone.attention import attention_row, rollout
from backbone.vit import VisionTransformer

DEPTH, HEADS = 3, 2


@pytest.fixture(scope="module")
def network() -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(
        image_size=16, patch_size=4, embed_dim=32, depth=DEPTH, num_heads=HEADS
    )
    for weights in network.parameters():
        weights.data += 0.2 * torch.randn_like(weights)
    return network.eval()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(2, 3, 20, 72, generator=torch.Generator().manual_seed(1))


def whole(network: VisionTransformer, pictures: Tensor, depth: int) -> Tensor:
    """The weights [B, A, T, T] of the last of the first `depth` blocks, as the network has them."""
    cut = VisionTransformer(image_size=16, patch_size=4, embed_dim=32, depth=depth, num_heads=HEADS)
    known = network.state_dict()
    cut.load_state_dict({name: known[name] for name in cut.state_dict()})
    weights = cut.eval()(pictures, attention="full").attention
    assert weights is not None
    return weights.detach()


@pytest.mark.parametrize("block", range(DEPTH))
@pytest.mark.parametrize("query", [0, 1, 45, 90])
def test_a_row_is_that_of_the_whole(
    network: VisionTransformer, pictures: Tensor, block: int, query: int
) -> None:
    expected = whole(network, pictures, block + 1)[:, :, query]
    with torch.inference_mode():
        found = attention_row(network, pictures, block=block, query=query)
    assert found.shape == (2, HEADS, 1 + 5 * 18)
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_last_blocks_cls_row_is_the_forwards_own(
    network: VisionTransformer, pictures: Tensor
) -> None:
    with torch.inference_mode():
        found = attention_row(network, pictures, block=DEPTH - 1)
        own = network(pictures, attention="cls").attention
    assert torch.allclose(found, own, atol=1e-6)


@pytest.mark.parametrize("query", [0, 7, 90])
def test_rollout_is_the_papers_product(
    network: VisionTransformer, pictures: Tensor, query: int
) -> None:
    for picture in pictures:
        product = np.eye(91)
        for block in range(DEPTH):
            mean = whole(network, picture[None], block + 1)[0].numpy().mean(axis=0)
            residual = mean.astype(np.float64) + np.eye(91)
            product = residual / residual.sum(axis=1, keepdims=True) @ product
        with torch.inference_mode():
            (found,) = rollout(network, picture[None], query=query).numpy()
        assert np.allclose(found, product[query], atol=1e-6)
        assert found.sum() == pytest.approx(1.0, abs=1e-5)


def test_rollout_makes_rows_in_pieces(
    network: VisionTransformer, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        at_once = rollout(network, pictures)
        monkeypatch.setattr("backbone.attention._ROWS", 7)
        in_pieces = rollout(network, pictures)
    assert torch.allclose(at_once, in_pieces, atol=1e-6)


def test_what_is_not_there(network: VisionTransformer, pictures: Tensor) -> None:
    for block in (-1, DEPTH):
        with pytest.raises(ValueError, match=f"block is {block}, not 0 to 2"):
            attention_row(network, pictures, block=block)
    for query in (-1, 91):
        with pytest.raises(ValueError, match="the tokens are 0 to 90"):
            attention_row(network, pictures, block=0, query=query)
        with pytest.raises(ValueError, match="the tokens are 0 to 90"):
            rollout(network, pictures, query=query)
