"""Timing: rows of a group take turns, so that drift of the machine hits all of them alike.

A turn is a call that does not count and then a few that do: what is timed is a call that follows
one of its own kind, as in training. The first call after other rows pays for what they left
behind: other data in the caches, and memory that the system has to hand out again.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]

MIN_SAMPLE_S = 1e-3  # shorter calls are repeated within a sample
TURN = 2  # samples
MIN_TURNS, MAX_TURNS = 3, 15
SLOW_TURNS = 2
SLOW_S = 0.1  # one such call is estimate enough, and SLOW_TURNS are turns enough
SINGLE_S = 20.0  # of a call that takes as long, the estimate is the only sample
TINY_GPU_S = 1e-4  # work below this is replayed as a CUDA graph, or launches are all one measures


class CpuClock:
    """Seconds of a call by the wall clock."""

    def prepare(self, run: Run) -> Run:
        return run

    def sample(self, run: Run, loops: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(loops):
            run()
        return (time.perf_counter() - start) / loops


class CudaClock:
    """Seconds of a call between two device events, after the L2 cache was overwritten."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def prepare(self, run: Run) -> Run:
        """Tiny work as a CUDA graph; as it is, if it is not tiny or cannot be captured."""
        if self.sample(run) > TINY_GPU_S:
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError:
            torch.cuda.synchronize()
            return run
        return graph.replay

    def sample(self, run: Run, loops: int = 1) -> float:
        total = 0.0
        for _ in range(loops):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end) * 1e-3
        return total / loops


Clock = CpuClock | CudaClock


def make_clock(device: str) -> Clock:
    """The clock for a device type."""
    return CudaClock() if device == "cuda" else CpuClock()


def quickest(clock: Clock, run: Run, calls: int = 2) -> float:
    """Seconds of the best of a few calls, after one that counts only if it is slow."""
    first = clock.sample(run)
    return first if first > SLOW_S else min(clock.sample(run) for _ in range(calls))


def loops_for(seconds: float) -> int:
    """Calls in one sample."""
    return max(1, math.ceil(MIN_SAMPLE_S / max(seconds, 1e-9)))


def interleave(
    clock: Clock, runs: dict[str, Run], first: dict[str, float], budget_s: float
) -> dict[str, list[float]]:
    """Samples (seconds a call) of every run; in a round each has a turn, in rotating order.

    `first` estimates the seconds of a call. Each run has an equal share of the budget, but at least
    MIN_TURNS (SLOW_TURNS if a call is slow); a run with fewer turns than there are rounds has them
    spread evenly. Of a call longer than SINGLE_S its estimate is the only sample.
    """
    loops = {name: loops_for(seconds) for name, seconds in first.items()}
    turns = {}
    samples = {name: [seconds] if seconds > SINGLE_S else [] for name, seconds in first.items()}
    for name, seconds in first.items():
        if seconds > SINGLE_S:
            turns[name] = 0
            continue
        affordable = int(budget_s / len(runs) / (seconds * (1 + TURN * loops[name])))
        least = SLOW_TURNS if seconds > SLOW_S else MIN_TURNS
        turns[name] = max(least, min(MAX_TURNS, affordable))
    rounds = max(turns.values(), default=0)
    names = list(runs)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                if (i + 1) * turns[name] // rounds == i * turns[name] // rounds:
                    continue
                runs[name]()
                samples[name] += (clock.sample(runs[name], loops[name]) for _ in range(TURN))
    finally:
        if collecting:
            gc.enable()
    return samples
