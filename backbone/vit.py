"""The Vision Transformer of DINO: one forward gives CLS, patch tokens and, when asked, attention.

Parameter names are those of the original implementation, so that its checkpoints load unchanged.

Legend for shapes: B pictures, C channels, D embedding size, N patches (h x w), T = 1 + N tokens,
A heads.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionRows = Literal["none", "cls", "full"]

_INIT_STD = 0.02


class Features(NamedTuple):
    """What one forward of a `VisionTransformer` gives; everything is after the final norm.

    Attributes:
        cls: the CLS token of the last block, [B, D].
        patches: the patch tokens of the last block, [B, N, D], row by row.
        grid: (h, w), the number of patches down and across; h * w = N.
        blocks: all tokens of each of the last `last_blocks` blocks, oldest first, each [B, T, D].
        attention: of the last block; [B, A, T] for its CLS row, [B, A, T, T] for the whole,
            or None where it was not asked for.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]
    blocks: tuple[Tensor, ...]
    attention: Tensor | None


class VisionTransformer(nn.Module):
    """A ViT with a CLS token, learned positions, pre-norm blocks and no classifier.

    Args:
        image_size: side in pixels of the square pictures that the positions are learned for;
            other sizes, square or not, are served by interpolating the positions.
        patch_size: side of a patch in pixels.
        in_channels: C.
        embed_dim: D.
        depth: number of blocks.
        num_heads: A; must divide D.
        mlp_ratio: hidden size of a block's MLP as a multiple of D.
        qkv_bias: whether queries, keys and values have a bias (DINO's do).
        drop_path_rate: stochastic depth of the last block; earlier blocks rise to it linearly.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size < patch_size:
            raise ValueError(f"image_size {image_size} is smaller than patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate} is not in [0, 1)")
        self.image_size = image_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.num_heads = num_heads

        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        n_patches = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + n_patches, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        nn.init.trunc_normal_(self.pos_embed, std=_INIT_STD)
        nn.init.trunc_normal_(self.cls_token, std=_INIT_STD)
        self.apply(_init_linear)

    def forward(
        self, pictures: Tensor, *, last_blocks: int = 1, attention: AttentionRows = "none"
    ) -> Features:
        """Runs the network on pictures [B, C, H, W] of any size that holds a patch.

        What is left over at the right and bottom, less than a patch, is not seen: the paper's
        patches of 5 cover 220 of 224 pixels.

        Args:
            pictures: normalised pictures.
            last_blocks: how many of the last blocks' tokens to return in `Features.blocks`.
            attention: "cls" computes the last block's attention of CLS to every token, at the
                cost of one row; "full" all T x T of it.

        Raises:
            ValueError: the pictures' shape does not fit the network, or `last_blocks` its depth.
        """
        self._check(pictures, last_blocks)
        x = self.patch_embed(pictures)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(h, w)

        kept: list[Tensor] = []
        weights: Tensor | None = None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x, weights = block(x, attention if i == last else "none")
            if i > last - last_blocks:
                kept.append(self.norm(x))
        tokens = kept[-1]
        return Features(tokens[:, 0], tokens[:, 1:], (h, w), tuple(kept), weights)

    def positions(self, h: int, w: int) -> Tensor:
        """The positions [1, 1 + h * w, D] of a grid of h x w patches.

        Where the grid is not the learned one they are interpolated as the original does it:
        bicubic, with scale factors (h + .1) / H and (w + .1) / W. The .1 was a guard against
        rounding; it shifts the sampling points a little, and is kept for parity.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(
            grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic"
        )
        return torch.cat((cls, grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    def _check(self, pictures: Tensor, last_blocks: int) -> None:
        if pictures.ndim != 4 or pictures.shape[1] != self.in_channels:
            raise ValueError(
                f"pictures have shape {list(pictures.shape)}, "
                f"not [batch, {self.in_channels}, height, width]"
            )
        height, width = pictures.shape[-2:]
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"pictures of {height} x {width} pixels hold no patch of {self.patch_size}"
            )
        if not 1 <= last_blocks <= len(self.blocks):
            raise ValueError(f"last_blocks is {last_blocks}, not 1 to {len(self.blocks)}")


class PatchEmbedding(nn.Module):
    """Pictures [B, C, H, W] -> patch embeddings [B, D, h, w], by one strided convolution."""

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pictures: Tensor) -> Tensor:
        """Embeds each patch on its own."""
        embedded: Tensor = self.proj(pictures)
        return embedded


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection and stochastic depth."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, attention: AttentionRows) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T, D] -> tokens [B, T, D], and the attention that was asked for."""
        y, weights = self.attn(self.norm1(x), attention)
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, weights


class Attention(nn.Module):
    """Multi-head self-attention, fused; the weights themselves only where asked for."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attention: AttentionRows) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T, D] -> [B, T, D] and None, [B, A, T] (CLS row) or [B, A, T, T]."""
        b, t, d = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(1, 2).reshape(b, t, d))
        if attention == "none":
            return y, None
        rows = q[:, :, :1] if attention == "cls" else q
        weights = (rows * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return y, weights[:, :, 0] if attention == "cls" else weights


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D] -> [B, T, D]."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, a sample's branch is dropped whole."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Scales what is kept by 1 / (1 - rate), so that the expectation is unchanged."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        shape = (len(x),) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
