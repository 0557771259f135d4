"""The head's last layer: K weight-normalised rows, the largest matrix of a small run."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CACHED = 2**19  # numbers; 2 MiB of float32


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are g * v / |v| (arXiv 1602.07868).

    Under the original's names `weight_g` and `weight_v`: the framework's function that used them
    is deprecated, and its successor stores other names.

    The rows live in a buffer of the precision they are used in, which each forward fills anew: with
    K = 65536 they take 64 MiB, and on the CPU making room for them cost more than the arithmetic.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        bound = in_features**-0.5  # what nn.Linear starts from
        nn.init.uniform_(self.weight_v, -bound, bound)
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]. A forward ends what an earlier one's backward needs."""
        kind = "cpu" if x.is_meta else x.device.type  # estimates of memory have no device
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = self.rows
        if rows is None or rows.dtype != dtype or rows.device != x.device:
            rows = self.rows = torch.empty(self.weight_v.shape, dtype=dtype, device=x.device)
        out: Tensor = _WeightNormLinear.apply(x.to(dtype), self.weight_v, self.weight_g, rows)
        return out


class _WeightNormLinear(torch.autograd.Function):
    """x w^T with w = g v / |v|, and its gradients: with u = v / |v| and dw = dy^T x,

    dg = dw . u, dv = g / |v| (dw - (dw . u) u). Done in pieces that stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, g: Tensor, rows: Tensor) -> Tensor:
        norms = torch.empty_like(g)
        for piece in _pieces(v):
            torch.linalg.vector_norm(v[piece], dim=1, keepdim=True, out=norms[piece])
            rows[piece] = v[piece] * (g[piece] / norms[piece])
        ctx.save_for_backward(x, v, g, norms, rows)
        return F.linear(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, v, g, norms, rows = ctx.saved_tensors
        dx = dy @ rows if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, None
        dw = dy.T @ x
        dv, dg = torch.empty_like(v), torch.empty_like(g)
        for piece in _pieces(v):
            d, u = dw[piece].float(), v[piece] / norms[piece]
            dot = (d * u).sum(dim=1, keepdim=True)
            dg[piece] = dot
            dv[piece] = d.addcmul_(u, dot, value=-1).mul_(g[piece] / norms[piece])
        return dx, dv, dg if ctx.needs_input_grad[2] else None, None


def _pieces(rows: Tensor) -> Iterator[slice]:
    """Slices over the rows: of a size for the cache on the CPU, else one for all."""
    count, width = rows.shape
    size = max(1, _CACHED // width) if rows.device.type == "cpu" else count
    for start in range(0, count, size):
        yield slice(start, start + size)
