"""How a network's products are computed: fp32 as fast as it goes, bf16, or 8-bit whole numbers."""

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from backbone.architectures import Backbone
from backbone.vit import Block, Mlp, VisionTransformer

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def in_precision(network: Backbone, precision: Precision, device: torch.device) -> Backbone:
    """Prepares a network, in place, for inference in `precision`; bf16 also needs autocast.

    In fp32 on the CPU a block's MLP is two calls of oneDNN with packed weights and the GELU in the
    first. In int8 the linear layers of all blocks take 8-bit weights, one scale for each output,
    and round their inputs to 8 bits by each batch's own range; the rest stays in fp32.

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
    if isinstance(network, VisionTransformer) and device.type == "cpu":
        for i, block in enumerate(network.blocks):
            assert isinstance(block, Block)
            if precision == "int8":
                _quantize(block, is_last=i == len(network.blocks) - 1)
            elif precision == "fp32" and torch._C._has_mkldnn:
                block.register_module("mlp", _FusedMlp(block.mlp))
    return network


def _quantize(block: Block, *, is_last: bool) -> None:
    if not is_last:  # the last block takes the weights of its queries apart
        block.attn.register_module("qkv", _Int8Linear(block.attn.qkv))
    block.attn.register_module("proj", _Int8Linear(block.attn.proj))
    block.mlp.register_module("fc1", _Int8Linear(block.mlp.fc1))
    block.mlp.register_module("fc2", _Int8Linear(block.mlp.fc2))


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
    """A linear layer of 8-bit weights whose inputs are rounded to 8 bits as they come."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127.0).clamp(min=1e-12).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # The type of tensor that torch's own kernels take is on its way out; they are not.
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            bias = None if layer.bias is None else layer.bias.detach()
            self._packed: Any = torch.ops.quantized.linear_prepack(quantized, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], float32."""
        y: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed)
        return y
