"""The roof of a machine: PyTorch's rates of a large matrix product and of moving memory.

The least time of a kernel is the larger of flops / matmul rate and bytes / memory rate. Memory is
the faster, the less of it there is, because of the caches: the rate is that of as many bytes or
fewer. The roof can still be beaten a little: PyTorch's own kernels are not the fastest.

A neighbour on the machine must not lower the roof. So rates are the best of products of several
sizes, of copies and of sums, probed before, between and after the groups of a run, and shares are
worked out when the run is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.clock import loops_for, make_clock, quickest
from hierkernels.ops.attention.spec import dtype_name

SIZES = {"cpu": (1024, 2048, 3072), "cuda": (4096, 8192)}  # n of (n, n) matrices
MOVED = {  # bytes read and written at a time; the last is beyond any cache
    "cpu": (2**24, 2**26, 2**28, 2**30),
    "cuda": (2**26, 2**28, 2**30, 2**32),
}
LONG_ROUNDS, SHORT_ROUNDS = 5, 2  # a round is one product, or one move, of each size
PROBE_EVERY_S = 60.0  # while a run lasts


@dataclass(frozen=True)
class Roof:
    """Rates measured in one run."""

    flops: Mapping[str, float]  # FLOP/s of a matrix product, by dtype name
    memory: Mapping[int, float]  # bytes/s, reads plus writes, by the bytes moved

    def memory_rate(self, nbytes: float) -> float:
        """Bytes/s of the largest move that is not larger, or of the smallest.

        A larger one that was quicker counts as well.
        """
        smaller = [size for size in self.memory if size <= nbytes]
        least = max(smaller, default=min(self.memory))
        return max(rate for size, rate in self.memory.items() if size >= least)

    def share(self, info: Mapping[str, Any], seconds: float) -> float:
        """The least time for the dtype, flops and bytes of a row's info, over its seconds."""
        computing = info["flops"] / self.flops[info["dtype"]]
        moving = info["bytes"] / self.memory_rate(info["bytes"])
        return max(computing, moving) / seconds

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate * 1e-9:,.0f} GFLOP/s" for name, rate in self.flops.items())
        moves = ", ".join(
            f"{rate * 1e-9:,.0f} GB/s ({size >> 20} MiB)" for size, rate in self.memory.items()
        )
        return f"matrix product {rates}; memory {moves}"


class RoofMeter:
    """The best rates seen so far."""

    def __init__(self, device: str, dtypes: Iterable[torch.dtype]) -> None:
        self.device, self.dtypes, self.clock = device, tuple(dtypes), make_clock(device)
        self.flops = {dtype_name(dtype): 0.0 for dtype in self.dtypes}
        self.memory = dict.fromkeys(MOVED[device], 0.0)
        self.probed = 0.0  # when, in seconds of the monotonic clock

    @property
    def roof(self) -> Roof:
        return Roof(dict(self.flops), dict(self.memory))

    def probe(self) -> None:
        """Products and moves of every size: at the start of a run."""
        self._probe(SIZES[self.device], MOVED[self.device], LONG_ROUNDS)

    def probe_again(self) -> None:
        """Some of that, between groups and at the end; nothing shortly after the last probe."""
        if time.monotonic() - self.probed > PROBE_EVERY_S:
            self._probe(SIZES[self.device][:-1], MOVED[self.device][:-1], SHORT_ROUNDS)

    def _probe(self, sizes: Sequence[int], moved: Sequence[int], rounds: int) -> None:
        for dtype in self.dtypes:
            for n in sizes:
                self._product(n, dtype, rounds)
        for nbytes in moved:
            self._move(nbytes, rounds)
        self.probed = time.monotonic()

    def _product(self, n: int, dtype: torch.dtype, rounds: int) -> None:
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(rounds + 1):  # the first pays for the library's start
            seconds = self.clock.sample(lambda: torch.mm(a, b, out=out))
            name = dtype_name(dtype)
            self.flops[name] = max(self.flops[name], 2 * n**3 / seconds)

    def _move(self, nbytes: int, rounds: int) -> None:
        # Ones: behind zeros that nobody wrote there may be no memory.
        a, b, c, out = (torch.ones(nbytes // 16, device=self.device) for _ in range(4))
        source, target = (torch.ones(nbytes // 8, device=self.device) for _ in range(2))
        for run in (lambda: torch.addcmul(a, b, c, out=out), lambda: target.copy_(source)):
            loops = loops_for(quickest(self.clock, run))
            for _ in range(rounds):
                seconds = self.clock.sample(run, loops)
                self.memory[nbytes] = max(self.memory[nbytes], nbytes / seconds)
