"""Where one token looks: its attention in any block, and rolled out over all of them.

Legend for shapes: B pictures, T = 1 + h * w tokens (CLS, then the patches row by row), A heads,
D embedding size, L blocks.
"""

import torch
from torch import Tensor

from backbone.vit import Block, VisionTransformer

_ROWS = 256  # of a T x T matrix that are made at a time


def attention_row(
    network: VisionTransformer, pictures: Tensor, *, block: int, query: int = 0
) -> Tensor:
    """The attention [B, A, T] of the token numbered `query` in one block; pictures [B, C, H, W].

    Of the T x T weights this one row alone is computed, and the blocks after it are not run.

    Raises:
        ValueError: there is no such block or token.
    """
    if not 0 <= block < len(network.blocks):
        raise ValueError(f"block is {block}, not 0 to {len(network.blocks) - 1}")
    x = _embedded(network, pictures, query)
    b, t, d = x.shape
    x, blocks = x.flatten(0, 1), _blocks(network)
    for earlier in blocks[:block]:
        x, _ = earlier(x, [(b, t)], (None, None), "none")
    chosen = blocks[block]
    q, k = chosen.attn.queries_keys(chosen.norm1(x).reshape(b, t, d))
    return chosen.attn.weights(q[:, :, query : query + 1], k)[:, :, 0]


def rollout(network: VisionTransformer, pictures: Tensor, *, query: int = 0) -> Tensor:
    """The attention [B, T] of the token `query`, rolled out over all blocks (arXiv 2005.00928).

    Each block's matrix is the mean over heads, with the identity added for the residual
    connection and rows scaled to one again: A = (W + I) / 2. The answer is the row `query` of
    A_L ... A_2 A_1. It is taken through the matrices from the last to the first, and of each no
    more than 256 rows stand in memory: beside the blocks' inputs, L x B x T x D, the most that is
    held is B x A x 256 x T.

    Raises:
        ValueError: there is no such token.
    """
    x = _embedded(network, pictures, query)
    blocks = _blocks(network)
    inputs: list[Tensor] = []
    for i, block in enumerate(blocks):
        inputs.append(block.norm1(x))
        if i < len(blocks) - 1:
            x = _through(block, x)
    row = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)
    row[:, query] = 1.0
    for block, tokens in zip(reversed(blocks), reversed(inputs), strict=True):
        q, k = block.attn.queries_keys(tokens)
        attended = torch.zeros_like(row)
        for start in range(0, row.shape[1], _ROWS):
            weights = block.attn.weights(q[:, :, start : start + _ROWS], k).mean(dim=1)
            attended += torch.einsum("br,brt->bt", row[:, start : start + _ROWS], weights)
        row = (row + attended) / 2
    return row


def _embedded(network: VisionTransformer, pictures: Tensor, query: int) -> Tensor:
    x, _ = network.embed(pictures)
    if not 0 <= query < x.shape[1]:
        raise ValueError(f"query is {query}, but the tokens are 0 to {x.shape[1] - 1}")
    return x


def _blocks(network: VisionTransformer) -> list[Block]:
    return [block for block in network.blocks if isinstance(block, Block)]


def _through(block: Block, x: Tensor) -> Tensor:
    b, t, d = x.shape
    y: Tensor = block(x.flatten(0, 1), [(b, t)], (None, None), "none")[0]
    return y.reshape(b, t, d)
