"""The arithmetic of a step: fp32, or bf16 or fp16 by autocast, fp16 with a scaled loss."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What a recipe's `precision` means on `device`; None is fp32 throughout.

    "auto" is bf16 where the device multiplies it natively: CUDA, and processors with AVX512-BF16
    or AMX, on which a step takes two thirds of its time in fp32 (docs/benchmarks.md).
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" or _cpu_multiplies_bf16() else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def precision_name(dtype: torch.dtype | None) -> str:
    """What `autocast_dtype` chose, as recipes call it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32") if dtype else "fp32"


def _cpu_multiplies_bf16() -> bool:
    """Older versions of the framework cannot tell; the answer is no there."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


class LossScale(nn.Module):
    """Multiplies the loss, so that fp16's small gradients do not vanish; dynamic, on the device.

    The framework's own scaler asks the host each step whether a gradient was infinite. This one
    never does: halved after a step with gradients that are not finite, doubled after `interval`
    good ones.
    """

    scale: Tensor
    good_steps: Tensor

    def __init__(self, *, initial: float = 2.0**16, interval: int = 2000) -> None:
        super().__init__()
        self.interval = interval
        self.register_buffer("scale", torch.tensor(initial))
        self.register_buffer("good_steps", torch.tensor(0))

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Takes in whether the step's gradients were not finite (above 0)."""
        bad = found_inf > 0
        self.good_steps.copy_(torch.where(bad, 0, self.good_steps + 1))
        grow = self.good_steps >= self.interval
        self.good_steps.masked_fill_(grow, 0)
        factor = torch.where(bad, 0.5, 1.0 + grow.float())
        self.scale.mul_(factor)


@contextmanager
def attention_kernel(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Chooses the kernel of attention inside; blocks that are recomputed in a backward need it too.

    On the CPU the fused attention's backward is three to four times slower in bf16 than the same
    attention written out (docs/benchmarks.md), so that the framework's own unfused one is chosen.
    """
    if dtype is None or device.type != "cpu":
        yield
        return
    before = bool(torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Runs what is inside in `dtype` where that is safe; does nothing for None."""
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype), attention_kernel(device, dtype):
        yield
