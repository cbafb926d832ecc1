"""The roof of a machine: PyTorch's rates of a large matrix product and of a large copy.

The least time of a kernel is the larger of flops / matmul rate and bytes / copy rate. It can be
beaten: data in the caches moves faster than the copy, and PyTorch's matmul is not the fastest.

A neighbour on the machine must not lower the roof. So rates are the best of products of several
sizes and of copies, probed before, between and after the groups of a run, and shares are worked out
when the run is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clock import make_clock
from hierkernels.ops.attention.spec import dtype_name

SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}  # n of (n, n) matrices
COPIED = {"cpu": 2**29, "cuda": 2**31}  # bytes, beyond any cache
LONG_ROUNDS, SHORT_ROUNDS = 4, 2  # a round is one product of each size, or one copy


@dataclass(frozen=True)
class Roof:
    """Rates measured in one run."""

    flops: Mapping[str, float]  # FLOP/s of a matrix product, by dtype name
    copy: float  # bytes/s of a copy, reads plus writes

    def share(self, info: Mapping[str, Any], seconds: float) -> float:
        """The least time for the dtype, flops and bytes of a row's info, over its seconds."""
        return max(info["flops"] / self.flops[info["dtype"]], info["bytes"] / self.copy) / seconds

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate * 1e-9:,.0f} GFLOP/s" for name, rate in self.flops.items())
        return f"matrix product {rates}; copy {self.copy * 1e-9:.1f} GB/s"


class RoofMeter:
    """The best rates seen so far."""

    def __init__(self, device: str) -> None:
        self.device, self.clock = device, make_clock(device)
        self.flops: dict[str, float] = {}
        self.copy = 0.0

    @property
    def roof(self) -> Roof:
        return Roof(dict(self.flops), self.copy)

    def probe(self, dtypes: Iterable[torch.dtype], long: bool = False) -> None:
        """Some products of each dtype and some copies; `long` for the start and end of a run."""
        sizes = SIZES[self.device]
        for dtype in dtypes:
            for n in sizes if long else sizes[:-1]:
                self._product(n, dtype, LONG_ROUNDS if long else SHORT_ROUNDS)
        self._copy(LONG_ROUNDS if long else SHORT_ROUNDS)

    def _product(self, n: int, dtype: torch.dtype, rounds: int) -> None:
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(rounds + 1):  # the first pays for the library's start
            seconds = self.clock.sample(lambda: torch.mm(a, b, out=out))
            name = dtype_name(dtype)
            self.flops[name] = max(self.flops.get(name, 0.0), 2 * n**3 / seconds)

    def _copy(self, rounds: int) -> None:
        nbytes = COPIED[self.device]
        source = torch.ones(
            nbytes, dtype=torch.uint8, device=self.device
        )  # zeros: no memory behind
        target = torch.zeros_like(source)
        for _ in range(rounds):
            seconds = self.clock.sample(lambda: target.copy_(source))
            self.copy = max(self.copy, 2 * nbytes / seconds)
