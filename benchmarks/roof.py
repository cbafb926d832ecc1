"""The roof of a machine: PyTorch's rates of a large matrix product and of a large copy.

The least time of a kernel is the larger of flops / matmul rate and bytes / copy rate. It can be
beaten: data in the caches moves faster than the copy, and PyTorch's matmul is not the fastest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.clock import make_clock, quickest
from hierkernels.ops.attention.spec import dtype_name


@dataclass(frozen=True)
class Roof:
    """Rates measured in this run."""

    flops: dict[str, float]  # FLOP/s of a matrix product, by dtype name
    copy: float  # bytes/s of a copy, reads plus writes

    def seconds(self, flops: float, nbytes: float, dtype: torch.dtype) -> float:
        """The least time for that much arithmetic and that many bytes."""
        return max(flops / self.flops[dtype_name(dtype)], nbytes / self.copy)


def measure_roof(device: str, dtypes: Iterable[torch.dtype]) -> Roof:
    """Best of a few products of n x n matrices for each dtype, and of a few copies."""
    clock = make_clock(device)
    n, copied = (8192, 2**31) if device == "cuda" else (4096, 2**29)
    flops = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        flops[dtype_name(dtype)] = 2 * n**3 / quickest(clock, product, calls=10)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Roof(flops, 2 * copied / quickest(clock, lambda: target.copy_(source), calls=10))
