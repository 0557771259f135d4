"""Attention on the CPU: fused and unfused, fp32 and bf16, forward and backward, in one run.

    python benchmarks/cpu_attention.py [--json]

What `training/precision.py` chooses by. Ratios are against the fused kernel in fp32.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = ((128, 65), (64, 37), (128, 10))  # (batch, tokens) of ViT-Ti/8: 64, 48 and 24 pixels
HEADS, HEAD_DIM = 3, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    results: dict[str, dict[str, float]] = {}
    for batch, tokens in SHAPES:
        times = {
            f"{name} {dtype}": seconds(attention(batch, tokens, dtype, kernel), options.repeats)
            for name, kernel in (
                ("fused", SDPBackend.FLASH_ATTENTION),
                ("unfused", SDPBackend.MATH),
            )
            for dtype in (torch.float32, torch.bfloat16)
        }
        base = times["fused torch.float32"]
        ratios = {name: round(base / time_s, 2) for name, time_s in times.items()}
        results[f"{batch} x {tokens}"] = ratios
        if not options.json:
            print(f"{batch} pictures of {tokens} tokens, speed against fused fp32: {ratios}")
    if options.json:
        print(json.dumps(results))


def attention(
    batch: int, tokens: int, dtype: torch.dtype, kernel: SDPBackend
) -> Callable[[], None]:
    shape = (batch, tokens, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))

    def run() -> None:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, k, v).sum().backward()

    return run


def seconds(run: Callable[[], None], repeats: int) -> float:
    run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
