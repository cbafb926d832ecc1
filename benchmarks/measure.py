"""One measurement of a whole group: check every row, then time all of them interleaved.

A row that breaks the accuracy rule fails and is not timed. The oracle of a long case looks at every
CHECK_STEPth query only: the check runs the row on the full-size problem with dout zero at all other
queries, so out, dq and lse are compared at those rows, and dk, dv and dbias everywhere.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import clock, memory
from benchmarks.roof import Roof
from benchmarks.rows import Candidate, Unsupported, candidates
from hierkernels import testing
from hierkernels.ops.attention.spec import Case, dtype_name

CHECK_SCORES = 2**22  # a case with more (query, key) pairs is checked on some of its queries
CHECK_STEP, CHECK_START = 61, 7  # prime, so that the queries fall on every place of a tile


@dataclass(frozen=True)
class Group:
    """What the rows of a group have in common."""

    case: Case
    dtype: torch.dtype
    direction: str  # "forward" | "backward"

    def __str__(self) -> str:
        return f"attention · {self.case.name} · {dtype_name(self.dtype)} · {self.direction}"


@dataclass
class RowResult:
    """Samples of one row, or why there are none."""

    samples: list[float] = field(default_factory=list)  # seconds a call
    extra_info: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    failed: str = ""


@dataclass(frozen=True)
class Problem:
    """The inputs of a case and dtype, and what results are judged by."""

    inputs: testing.Inputs
    checked: slice  # the queries that the standard has
    standard: testing.Standard

    @staticmethod
    def make(case: Case, dtype: torch.dtype, device: str) -> Problem:
        inputs = testing.make_inputs(case, dtype, device)
        checked, judged = slice(None), inputs
        if case.B * case.Hq * case.Nq * case.Nk > CHECK_SCORES:
            checked = slice(CHECK_START, None, CHECK_STEP)
            judged = inputs.thin(CHECK_START, CHECK_STEP)
        return Problem(inputs, checked, testing.make_standard(judged))

    def check(self, candidate: Candidate, direction: str) -> dict[str, testing.Errors]:
        """The errors of out, or of all gradients. Raises AssertionError if one is too large."""
        if direction == "forward":
            with torch.no_grad():
                out = candidate.function(candidate.inputs)
            return self.standard.check({"out": out[:, :, self.checked]})
        dout = torch.zeros_like(candidate.inputs.dout)
        dout[:, :, self.checked] = candidate.inputs.dout[:, :, self.checked]
        inputs = replace(candidate.inputs, dout=dout).requires_grad()
        grads = testing.differentiate(inputs, candidate.function(inputs), None)
        grads["dq"] = grads["dq"][:, :, self.checked]
        if "dbias" in grads and grads["dbias"].shape[2] > 1:
            grads["dbias"] = grads["dbias"][:, :, self.checked]
        return self.standard.check(grads)


def bind(candidate: Candidate, direction: str) -> Callable[[], Sequence[torch.Tensor]]:
    """The call that is timed: forward without a graph, or backward on a graph that is kept."""
    if direction == "forward":

        def forward() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return (candidate.function(candidate.inputs),)

        return forward
    inputs = candidate.inputs.requires_grad()
    out = candidate.function(inputs)
    wanted = list(inputs.differentiable().values())

    def backward() -> Sequence[torch.Tensor]:
        return torch.autograd.grad(out, wanted, inputs.dout, retain_graph=True)

    return backward


class Measurements:
    """Measures groups on first use and keeps the results; keeps one problem at a time."""

    def __init__(
        self, device: str, roof: Roof, budget_s: float, say: Callable[[str], None], total: int
    ) -> None:
        self.device, self.roof, self.budget_s = device, roof, budget_s
        self.say, self.total = say, total  # total: groups to come, for the progress line
        self.clock = clock.make_clock(device)
        self.results: dict[Group, dict[str, RowResult]] = {}
        self._problem: tuple[tuple[Case, torch.dtype], Problem] | None = None

    def group(self, group: Group, rows: Sequence[str]) -> dict[str, RowResult]:
        """The results of the rows, by name."""
        if group not in self.results:
            self.results[group] = self._measure(group, rows)
            self.say(self._progress(group))
        return self.results[group]

    def _problem_of(self, group: Group) -> Problem:
        key = (group.case, group.dtype)
        if self._problem is None or self._problem[0] != key:
            self._problem = None  # frees the old one first
            torch.compiler.reset()
            gc.collect()
            self._problem = (key, Problem.make(*key, self.device))
        return self._problem[1]

    def _measure(self, group: Group, rows: Sequence[str]) -> dict[str, RowResult]:
        problem = self._problem_of(group)
        results = {row: RowResult() for row in rows}
        runs: dict[str, clock.Run] = {}
        for row, result in results.items():
            try:
                runs[row] = self._prepare(row, group, problem, result)
            except Unsupported as error:
                result.skipped = str(error)
            except AssertionError as error:
                result.failed = f"wrong result, not timed: {error}"
        for row, samples in clock.interleave(self.clock, runs, self.budget_s).items():
            results[row].samples = samples
            self._rate(group, results[row])
        return results

    def _prepare(self, row: str, group: Group, problem: Problem, result: RowResult) -> clock.Run:
        """The row's quickest candidate that works, checked. Fills in errors and peak memory."""
        best: tuple[float, Candidate, dict[str, testing.Errors], clock.Run] | None = None
        choices = list(candidates(row, problem.inputs, group.direction))
        for candidate in choices:
            try:
                errors = problem.check(candidate, group.direction)
                run = bind(candidate, group.direction)
                seconds = clock.quickest(self.clock, run) if len(choices) > 1 else 0.0
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
        _, candidate, errors, run = best
        result.extra_info = {
            "errors": {name: error.largest for name, error in errors.items()},
            "peak_extra_bytes": memory.peak_extra(run, self.device),
            "variant": candidate.label,
        }
        return self.clock.prepare(run)

    def _rate(self, group: Group, result: RowResult) -> None:
        """Adds FLOPs, bytes, rates and the share of the roof, at the median time."""
        case = group.case
        seconds = median(result.samples)
        flops = case.flops(group.direction)
        nbytes = case.bytes(group.dtype, group.direction)
        result.extra_info |= {
            "flops": flops,
            "bytes": nbytes,
            "gflop_per_s": flops / seconds * 1e-9,
            "gb_per_s": nbytes / seconds * 1e-9,
            "roof_share": self.roof.seconds(flops, nbytes, group.dtype) / seconds,
            "shape": [case.B, case.Hq, case.Hkv, case.Nq, case.Nk, case.D, case.Dv],
            "case": case.name,
            "case_group": case.group,
            "dtype": dtype_name(group.dtype),
            "direction": group.direction,
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
