"""The arithmetic of a step: fp32, or bf16 by autocast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What a recipe's `precision` means on `device`; None is fp32 throughout."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Runs what is inside in `dtype` where that is safe; does nothing for None.

    On the CPU the fused attention's backward is three to four times slower in bf16 than the same
    attention written out (docs/benchmarks.md), so that the framework's own unfused one is chosen.
    """
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype):
        if device.type != "cpu":
            yield
            return
        before = bool(torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())  # type: ignore[no-untyped-call]
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
