"""Feeds durations that were measured elsewhere to pytest-benchmark.

pytest-benchmark runs all rounds of one row before the next row starts; ours are interleaved. So the
samples of a group are taken beforehand, and each row's test replays its own: the fixture's timer is
a clock that stands still, and the function under test moves it on by the next sample. Use:

    @pytest.mark.benchmark(timer=replay.clock)
    def test(benchmark): replay.replay(benchmark, samples)
"""

from __future__ import annotations

from typing import Any


class StoppedClock:
    """A timer that moves only by advance()."""

    __name__ = "replay.clock"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


clock = StoppedClock()


def replay(benchmark: Any, samples: list[float]) -> None:
    """One round of the fixture for each sample (seconds)."""
    following = iter(samples)
    clock.now = 0.0
    benchmark.pedantic(lambda: clock.advance(next(following)), rounds=len(samples))
