"""The Vision Transformer of DINO: one forward gives CLS, patch tokens and, when asked, attention.

Parameter names are those of the original implementation, so that its checkpoints load unchanged.

Legend for shapes: B pictures, C channels, D embedding size, N patches (h x w), T = 1 + N tokens,
A heads. Inside, the tokens of all pictures stand one after another as [sum of B * T, D], so that
pictures of several sizes share every norm and linear layer; attention alone takes them apart.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbone.stochastic_depth import (
    Branch,
    Choice,
    Factors,
    Group,
    Kept,
    draw_choices,
    draw_factors,
    spread_factors,
)

AttentionRows = Literal["none", "cls", "full"]

_SMALL_GRID = 256  # patches; of more, the network's own time is much longer
_GRIDS = 16  # that are kept, at most
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

    Attributes:
        recompute_blocks: trades time for memory in `forward_cls`.
        fixed_shapes: stochastic depth multiplies by 0 on a CPU as well, so that blocks can be
            compiled once.
        fixed_weights: they no longer change, so that positions which are interpolated from them are
            kept, of a few small grids.
        drawn: stochastic depth's factors for the forwards to come, on the device (see
            `draw_factors`); where empty, each forward draws its own.
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
        self.drop_path_rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate) for rate in self.drop_path_rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.recompute_blocks = False
        self.fixed_shapes = False
        self.fixed_weights = False
        self._kept_positions: dict[tuple[int, int], Tensor] = {}
        self.drawn: list[Tensor] = []

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
        if not 1 <= last_blocks <= len(self.blocks):
            raise ValueError(f"last_blocks is {last_blocks}, not 1 to {len(self.blocks)}")
        x, (h, w) = self.embed(pictures)
        b, t, d = x.shape
        x, groups = x.flatten(0, 1), [(b, t)]

        kept: list[Tensor] = []
        weights: Tensor | None = None
        last = len(self.blocks) - 1
        for i, (block, drawn) in enumerate(zip(self.blocks, self._paths(groups), strict=True)):
            x, weights = block(x, groups, drawn, attention if i == last else "none")
            if i > last - last_blocks:
                kept.append(self.norm(x).reshape(b, t, d))
        tokens = kept[-1]
        return Features(tokens[:, 0], tokens[:, 1:], (h, w), tuple(kept), weights)

    def forward_cls(self, batches: Sequence[Tensor]) -> Tensor:
        """The CLS [sum of B, D] of several batches, each [B, C, H, W] of a size of its own.

        One pass through the blocks serves them all; in the last one only the CLS tokens go on, so
        that nothing is computed which nobody reads.
        """
        parts = [self.embed(pictures)[0] for pictures in batches]
        groups = [(x.shape[0], x.shape[1]) for x in parts]
        x = torch.cat([part.flatten(0, 1) for part in parts])
        last = len(self.blocks) - 1
        for i, (block, drawn) in enumerate(zip(self.blocks, self._paths(groups), strict=True)):
            rest = (groups, drawn, "none", i == last)
            if self.recompute_blocks and torch.is_grad_enabled():
                # Blocks draw nothing: what they drop was drawn before.
                x, _ = checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                x, _ = block(x, *rest)
        cls: Tensor = self.norm(x)
        return cls

    def embed(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pictures [B, C, H, W] -> tokens before the first block [B, T, D], and their grid."""
        self._check(pictures)
        x = self.patch_embed(pictures)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        return x + self.positions(h, w), (h, w)

    def positions(self, h: int, w: int) -> Tensor:
        """The positions [1, 1 + h * w, D] of a grid of h x w patches.

        Where the grid is not the learned one they are interpolated as the original does it:
        bicubic, with scale factors (h + .1) / H and (w + .1) / W. The .1 was a guard against
        rounding; it shifts the sampling points a little, and is kept for parity.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        kept = self._kept_positions.get((h, w))
        if kept is not None:
            return kept
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(
            grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic"
        )
        positions = torch.cat((cls, grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
        if self.fixed_weights and h * w <= _SMALL_GRID:
            if len(self._kept_positions) >= _GRIDS:
                self._kept_positions = {}  # anew, for other threads may be looking at it
            self._kept_positions[h, w] = positions
        return positions

    def _paths(self, groups: Sequence[Group]) -> list[Kept]:
        rates, device = self.drop_path_rates, self.cls_token.device
        if not self.training or not any(rates):
            return [(None, None)] * len(rates)
        if self.drawn:
            return spread_factors(self.drawn.pop(0), rates, groups)
        if device.type == "cpu" and not self.fixed_shapes:
            return draw_choices(rates, groups)
        factors = draw_factors(rates, groups)
        if device.type == "cuda":
            factors = factors.pin_memory()
        return spread_factors(factors.to(device, non_blocking=True), rates, groups)

    def _check(self, pictures: Tensor) -> None:
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
    """Pre-norm attention and MLP, each with a residual connection and stochastic depth.

    Stochastic depth (arXiv 1603.09382): in training, a picture's branch is dropped whole with
    probability `drop_path_rate`, and what is kept is scaled by 1 / (1 - rate); see `Kept`.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.drop_path_rate = drop_path_rate
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        groups: Sequence[Group],
        kept: Kept,
        attention: AttentionRows,
        cls_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [sum of B * T, D] -> the same, and the attention that was asked for.

        With `cls_only` the CLS tokens alone come out, [sum of B, D], for the price of theirs.
        """
        first, second = kept
        some, some_groups = (
            (x[first.rows], first.groups) if isinstance(first, Choice) else (x, groups)
        )
        if cls_only:
            y, weights = self.attn.forward_cls(self.norm1(some), some_groups), None
            x = torch.cat([part[:, 0] for part in _split(x, groups)])
        else:
            y, weights = self.attn(self.norm1(some), some_groups, attention)
        x = self._add(x, y, first, cls_only)
        some = x[second.pictures if cls_only else second.rows] if isinstance(second, Choice) else x
        return self._add(x, self.mlp(self.norm2(some)), second, cls_only), weights

    def _add(self, x: Tensor, y: Tensor, branch: Branch, cls_only: bool) -> Tensor:
        if branch is None:
            return x + y
        if isinstance(branch, Factors):
            return torch.addcmul(x, y, branch.pictures if cls_only else branch.tokens)
        scale = 1.0 / (1.0 - self.drop_path_rate)
        rows = branch.pictures if cls_only else branch.rows
        return x.index_add(0, rows, y.to(x.dtype), alpha=scale)


class Attention(nn.Module):
    """Multi-head self-attention, fused; the weights themselves only where asked for."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, groups: Sequence[Group], attention: AttentionRows
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [sum of B * T, D] -> the same, and None, [B, A, T] (CLS row) or [B, A, T, T].

        Weights are those of the last group, which is the only one where they are asked for.
        """
        mixed: list[Tensor] = []
        q = k = x
        for part in _split(self.qkv(x), groups):
            b, t, d = part.shape
            if b == 0:  # all of them dropped: not every kernel takes an empty batch
                mixed.append(part[..., : d // 3].reshape(0, d // 3))  # weights get gradients of 0
                continue
            q, k, v = self._heads(part, 3)
            y = F.scaled_dot_product_attention(q, k, v)
            mixed.append(y.transpose(1, 2).reshape(b * t, d // 3))
        y = self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        if attention == "none":
            return y, None
        rows = q[:, :, :1] if attention == "cls" else q
        weights = self.weights(rows, k)
        return y, weights[:, :, 0] if attention == "cls" else weights

    def forward_cls(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """Tokens [sum of B * T, D] -> what attention gives the CLS tokens, [sum of B, D]."""
        d = x.shape[1]
        of_q, of_kv = torch.split(self.qkv.weight, [d, 2 * d])
        bias_q = bias_kv = None
        if self.qkv.bias is not None:
            bias_q, bias_kv = torch.split(self.qkv.bias, [d, 2 * d])
        mixed: list[Tensor] = []
        kv = F.linear(x, of_kv, bias_kv)
        for tokens, both in zip(_split(x, groups), _split(kv, groups), strict=True):
            if len(tokens) == 0:
                mixed.append(both[..., :d].reshape(0, d))
                continue
            (q,) = self._heads(F.linear(tokens[:, :1], of_q, bias_q), 1)
            k, v = self._heads(both, 2)
            mixed.append(F.scaled_dot_product_attention(q, k, v).reshape(len(q), d))
        y: Tensor = self.proj(torch.cat(mixed))
        return y

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, D] -> their queries and keys, each [B, A, T, D / A]."""
        q, k, _ = self._heads(self.qkv(x), 3)
        return q, k

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """How queries [B, A, R, D / A] attend to keys [B, A, T, D / A]: [B, A, R, T]."""
        return torch.softmax(q * self.scale @ k.transpose(-2, -1), dim=-1)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, T, parts * D] -> `parts` tensors [B, A, T, D / A]."""
        b, t, width = x.shape
        heads = x.reshape(b, t, parts, self.num_heads, width // parts // self.num_heads)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


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


def _split(x: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """[sum of B * T, D] -> each group's [B, T, D]."""
    parts = torch.split(x, [b * t for b, t in groups])
    return [part.reshape(b, t, x.shape[-1]) for part, (b, t) in zip(parts, groups, strict=True)]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
