"""How a network's products are computed: fp32 as fast as it goes, bf16, or 8-bit whole numbers."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from backbone.architectures import Backbone
from backbone.stochastic_depth import Group, Kept
from backbone.vit import AttentionRows, Block, Mlp, VisionTransformer

Precision = Literal["fp32", "bf16", "int8"]
_FEW_TOKENS = 128
_PICTURES = 4  # in the batch that decides
# Of tokens in no batch: prime, so they are one picture's; and less CLS twice a prime, so that its
# patches would lie in one row or in two, which `backbone.preprocess.LONGEST` excludes. (The last
# block may see CLS alone: nobody has 983 pictures in one part of a batch.)
_NOBODYS_ROWS = 983
_ABOUT = 1.05  # times as long is about as fast
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def in_precision(
    network: Backbone, precision: Precision, device: torch.device, *, tokens: int = 0
) -> Backbone:
    """Prepares a network, in place, for inference in `precision`; bf16 also needs autocast.

    In fp32 on the CPU a block's MLP is two calls of oneDNN with packed weights and the GELU in the
    first; where tokens are few, and that takes about as long here, the whole block is one call. In
    int8 the linear layers of all blocks take 8-bit weights, one scale for each output, and round
    their inputs to 8 bits by each batch's own range; the rest stays in fp32.

    Args:
        tokens: that pictures usually have, with CLS.

    Raises:
        ValueError: int8 of a network that is not a ViT, or on another device than the CPU.
    """
    if precision == "int8":
        if not isinstance(network, VisionTransformer):
            raise ValueError("precision is 'int8', which is for ViTs alone; use 'fp32' or 'bf16'")
        if device.type != "cpu":
            raise ValueError(
                f"precision is 'int8', which is for the CPU alone, and the model runs on "
                f"{device.type!r}; use 'bf16'"
            )
    if not isinstance(network, VisionTransformer) or device.type != "cpu" or precision == "bf16":
        return network
    blocks = [block for block in network.blocks if isinstance(block, Block)]
    if precision == "int8":
        for block in blocks:
            _quantize(block, is_last=block is blocks[-1])
    elif torch._C._has_mkldnn:
        whole = [_WholeBlock(block) for block in blocks]
        for block in blocks:
            block.register_module("mlp", _FusedMlp(block.mlp))
        if 1 < tokens <= _FEW_TOKENS and _is_as_fast(whole[0], blocks[0], tokens):
            network.blocks = nn.ModuleList(whole)
    return network


class _WholeBlock(Block):
    """`backbone.vit.Block` as one call of torch, where tokens are few and all are asked for.

    Between two calls, those that only see a tensor in another shape among them, a thread may wait
    for the interpreter's lock, and small products are done sooner than that. So tokens stay
    [B, T, D] from one such block to the next. Of many tokens one call is slower: it makes all T x T
    weights.
    """

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self.drop_path_rate = block.drop_path_rate
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        qkv, proj, mlp = block.attn.qkv, block.attn.proj, block.mlp
        no_bias = torch.zeros(len(qkv.weight))
        self._dim = proj.in_features
        self._arguments = (
            *(qkv.weight, no_bias if qkv.bias is None else qkv.bias, proj.weight, proj.bias),
            *(True, True, block.norm1.eps),  # GELU, the norm first
            *(block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias),
            *(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias),
        )

    def forward(
        self,
        x: Tensor,
        groups: Sequence[Group],
        kept: Kept,
        attention: AttentionRows,
        cls_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Block.forward`; of one group also [B, T, D] -> [B, T, D]."""
        b, t = groups[0]
        if len(groups) > 1 or t > _FEW_TOKENS or attention != "none" or cls_only:
            rows = x if x.ndim == 2 else x.flatten(0, 1)
            return super().forward(rows, groups, kept, attention, cls_only)
        tokens = x if x.ndim == 3 else x.reshape(b, t, self._dim)
        y: Tensor = torch._transformer_encoder_layer_fwd(
            tokens, self._dim, self.attn.num_heads, *self._arguments
        )
        return y, None


def _is_as_fast(one: Block, other: Block, tokens: int) -> bool:
    """Whether one thread computes `one` about as fast as `other`, for a few pictures."""
    groups, rounds = [(_PICTURES, tokens)], range(9)
    x = torch.zeros(_PICTURES * tokens, one.attn.proj.in_features)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            took: list[list[float]] = [[], []]
            for _ in rounds:
                for block, seconds in zip((one, other), took, strict=True):
                    start = time.perf_counter()
                    block(x, groups, (None, None), "none")
                    seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return median(took[0]) <= _ABOUT * median(took[1])


def _quantize(block: Block, *, is_last: bool) -> None:
    if not is_last:  # the last block takes the weights of its queries apart
        block.attn.register_module("qkv", _Int8Linear(block.attn.qkv))
    block.attn.register_module("proj", _Int8Linear(block.attn.proj))
    block.mlp.register_module("fc1", _Int8Linear(block.mlp.fc1))
    block.mlp.register_module("fc2", _Int8Linear(block.mlp.fc2))


@contextmanager
def _quantized_by_onednn() -> Iterator[None]:
    """What is packed inside runs in oneDNN's kernels, where torch has them: they know AMX."""
    engines, before = torch.backends.quantized.supported_engines, torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn" if "onednn" in engines else before
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


class _FusedMlp(nn.Module):
    """`backbone.vit.Mlp` with packed weights, and the GELU inside of the first product."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self._first, self._first_bias = _pack(mlp.fc1)
        self._second, self._second_bias = _pack(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, D] -> [n, D]."""
        linear = torch.ops.mkldnn._linear_pointwise
        hidden = linear(x, self._first, self._first_bias, "gelu", [], "none")
        y: Tensor = linear(hidden, self._second, self._second_bias, "none", [], "")
        return y


def _pack(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), layer.bias.detach()


class _Int8Linear(nn.Module):
    """A linear layer of 8-bit weights whose inputs are rounded to 8 bits as they come.

    Several threads may compute with one. Inside, torch keeps what it made for the first shape of
    inputs that came, scales included, and writes each call's scales there: calls of that shape
    would compute with each other's. So the first is one of `_NOBODYS_ROWS`.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127.0).clamp(min=1e-12).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        bias = None if layer.bias is None else layer.bias.detach()
        with warnings.catch_warnings(), _quantized_by_onednn():
            # The type of tensor that torch's own kernels take is on its way out; they are not.
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self._packed: Any = torch.ops.quantized.linear_prepack(quantized, bias)
        self(torch.zeros(_NOBODYS_ROWS, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], float32."""
        y: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed)
        return y
