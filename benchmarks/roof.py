"""The roof of a machine: PyTorch's rates of a large matrix product and of a large copy.

The least time of a kernel is the larger of flops / matmul rate and bytes / copy rate. It can be
beaten: data in the caches moves faster than the copy, and PyTorch's matmul is not the fastest.

A neighbour on the machine must not lower the roof. So rates are the best of products of several
sizes and of copies, probed before, between and after the groups of a run, and shares are worked out
when the run is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clock import make_clock
from hierkernels.ops.attention.spec import dtype_name

SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}  # n of (n, n) matrices
COPIED = {"cpu": 2**29, "cuda": 2**31}  # bytes, beyond any cache
LONG_ROUNDS, SHORT_ROUNDS = 5, 2  # a round is one product of each size, or one copy
PROBE_EVERY_S = 15.0  # while a run lasts


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

    def __init__(self, device: str, dtypes: Iterable[torch.dtype]) -> None:
        self.device, self.dtypes, self.clock = device, tuple(dtypes), make_clock(device)
        self.flops = {dtype_name(dtype): 0.0 for dtype in self.dtypes}
        self.copy = 0.0
        self.probed = 0.0  # when, in seconds of the monotonic clock

    @property
    def roof(self) -> Roof:
        return Roof(dict(self.flops), self.copy)

    def probe(self) -> None:
        """Products of every size, and copies: at the start and the end of a run."""
        self._probe(SIZES[self.device], LONG_ROUNDS)

    def probe_again(self) -> None:
        """Some of that, between groups; nothing if the last probe was a short while ago."""
        if time.monotonic() - self.probed > PROBE_EVERY_S:
            self._probe(SIZES[self.device][:-1], SHORT_ROUNDS)

    def _probe(self, sizes: Sequence[int], rounds: int) -> None:
        for dtype in self.dtypes:
            for n in sizes:
                self._product(n, dtype, rounds)
        self._copy(rounds)
        self.probed = time.monotonic()

    def _product(self, n: int, dtype: torch.dtype, rounds: int) -> None:
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(rounds + 1):  # the first pays for the library's start
            seconds = self.clock.sample(lambda: torch.mm(a, b, out=out))
            name = dtype_name(dtype)
            self.flops[name] = max(self.flops[name], 2 * n**3 / seconds)

    def _copy(self, rounds: int) -> None:
        nbytes = COPIED[self.device]
        # Ones: behind zeros that nobody wrote there may be no memory.
        source = torch.ones(nbytes, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        for _ in range(rounds):
            seconds = self.clock.sample(lambda: target.copy_(source))
            self.copy = max(self.copy, 2 * nbytes / seconds)
