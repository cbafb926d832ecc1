"""One measurement of a whole group: check every row, then time all of them interleaved.

A row that breaks the accuracy rule fails and is not timed. Every row writes its results to memory
that PyTorch's allocator hands out as it does for a user: on the CPU, large results are mapped anew
from call to call, and the page faults are part of the time, for every row alike.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import clock, memory
from benchmarks.roof import RoofMeter
from benchmarks.suite import Candidate, Problem, Suite, Unsupported, load
from hierkernels import dispatch
from hierkernels.ops.attention.spec import dtype_name


@dataclass(frozen=True)
class Group:
    """What the rows of a group have in common."""

    suite: Suite
    case: Any  # of the suite's cases
    dtype: torch.dtype
    direction: str  # one of the suite's: "forward", "backward", "step"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Names of op, case, dtype and direction."""
        return self.suite.name, self.case.name, dtype_name(self.dtype), self.direction

    def __str__(self) -> str:
        return " · ".join(self.key)


def groups(full: bool, names: Sequence[str]) -> list[Group]:
    """The groups of some suites, in the quick or the full set."""
    return [
        Group(suite, case, dtype, direction)
        for suite in map(load, names)
        for case in suite.cases
        for dtype in (case.dtypes if full else suite.quick_dtypes(case))
        for direction in suite.directions
    ]


@dataclass
class RowResult:
    """Samples of one row, or why there are none."""

    samples: list[float] = field(default_factory=list)  # seconds a call
    extra_info: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    failed: str = ""


class Measurements:
    """Measures groups on first use and keeps the results; keeps one problem at a time."""

    def __init__(
        self, roof: RoofMeter, budget_s: float, full: bool, say: Callable[[str], None], total: int
    ) -> None:
        self.device, self.roof, self.budget_s, self.full = roof.device, roof, budget_s, full
        self.say, self.total = say, total  # total: groups to come, for the progress line
        self.clock = clock.make_clock(self.device)
        self.results: dict[Group, dict[str, RowResult]] = {}
        self._problem: tuple[tuple[Suite, Any, torch.dtype], Problem] | None = None

    def group(self, group: Group, rows: Sequence[str]) -> dict[str, RowResult]:
        """The results of the rows, by name."""
        if group not in self.results:
            self.results[group] = self._measure(group, rows)
            self.say(self._progress(group))
        return self.results[group]

    def _problem_of(self, group: Group) -> Problem:
        key = (group.suite, group.case, group.dtype)
        if self._problem is None or self._problem[0] != key:
            self._problem = None  # frees the old one first
            torch.compiler.reset()
            gc.collect()
            self.roof.probe_again()
            self._problem = (key, group.suite.problem(group.case, group.dtype, self.device))
        return self._problem[1]

    def _measure(self, group: Group, rows: Sequence[str]) -> dict[str, RowResult]:
        problem = self._problem_of(group)
        results = {row: RowResult() for row in rows}
        plain: dict[str, clock.Run] = {}
        runs: dict[str, clock.Run] = {}
        first: dict[str, float] = {}
        for row, result in results.items():
            try:
                plain[row], runs[row], first[row] = self._prepare(row, group, problem, result)
            except Unsupported as error:
                result.skipped = str(error)
            except AssertionError as error:
                result.failed = f"wrong result, not timed: {error}"
        for row, samples in clock.interleave(self.clock, runs, first, self.budget_s).items():
            results[row].samples = samples
            self._describe(group, results[row])
        # Last, because it gives free memory back, and who takes it again pays for it.
        gc.collect()
        for row, run in plain.items():
            wanted = self.full or row in dispatch.BACKENDS  # peers take long to fetch their memory
            peak = memory.peak_extra(run, self.device) if wanted else None
            results[row].extra_info["peak_extra_bytes"] = peak
        return results

    def _prepare(
        self, row: str, group: Group, problem: Problem, result: RowResult
    ) -> tuple[clock.Run, clock.Run, float]:
        """The row's quickest candidate that works, as it is and as the clock wants it.

        With roughly the seconds of a call. Checks it, and fills in its errors.
        """
        best: tuple[float, Candidate, dict[str, float], clock.Run] | None = None
        for candidate in group.suite.candidates(row, problem.inputs, group.direction):
            try:
                errors = problem.check(candidate, group.direction)
                run = problem.bind(candidate, group.direction)
                seconds = clock.quickest(self.clock, run)
            except AssertionError:
                raise
            except Exception as error:  # a peer that cannot do the case says so in many ways
                result.skipped = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                )
                continue
            if best is None or seconds < best[0]:
                best = seconds, candidate, errors, run
        if best is None:
            raise Unsupported(result.skipped)
        result.skipped = ""
        seconds, candidate, errors, run = best
        result.extra_info = {"errors": errors, "variant": candidate.label}
        prepared = self.clock.prepare(run)
        if prepared is not run:
            seconds = clock.quickest(self.clock, prepared)
        return run, prepared, seconds

    def _describe(self, group: Group, result: RowResult) -> None:
        """Adds FLOPs, bytes, and rates at the median time; the run's end adds the roof's share."""
        seconds = median(result.samples)
        flops = group.case.flops(group.direction)
        nbytes = group.case.bytes(group.dtype, group.direction)
        op, case, dtype, direction = group.key
        result.extra_info |= {
            "flops": flops,
            "bytes": nbytes,
            "gflop_per_s": flops / seconds * 1e-9,
            "gb_per_s": nbytes / seconds * 1e-9,
            "shape": group.suite.shape(group.case),
            "op": op,
            "case": case,
            "case_group": group.case.group,
            "dtype": dtype,
            "direction": direction,
        }

    def _progress(self, group: Group) -> str:
        parts = []
        for row, result in self.results[group].items():
            if result.samples:
                parts.append(f"{row} {median(result.samples) * 1e3:.3g} ms")
            else:
                parts.append(f"{row} {'FAILED' if result.failed else 'skipped'}")
        return f"[{len(self.results)}/{self.total}] {group}: {', '.join(parts)}"


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the two."""
    ordered, n = sorted(samples), len(samples)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
