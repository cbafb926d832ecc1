"""hk.selected_attention against its eager reference, and against dense causal attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import hierkernels as hk
from benchmarks.suite import (
    BACKEND_ROWS,
    Candidate,
    MemorySweep,
    OpProblem,
    Suite,
    Sweep,
    Unsupported,
)
from hierkernels import dispatch
from hierkernels import testing as dense_testing
from hierkernels.ops.attention import spec as dense_spec
from hierkernels.ops.selected_attention import reference, testing
from hierkernels.ops.selected_attention.spec import SPEED, Case
from hierkernels.ops.selected_attention.testing import Inputs
from hierkernels.testing import Standard

# Rows that grow with the square of N. The reference holds some ten tensors of scores.
EAGER_SCORES, DENSE_SCORES = 2**27, 2**35
JUDGED_SCORES = 2**24  # of the oracle: as many of the last queries as have these


def _memory_case(n: int) -> Case:
    return Case(f"memory-n{n}", 1, 4, 1, n, n, 64, 64, 16, 4)


@dataclass(frozen=True)
class SelectedProblem(OpProblem):
    """Judged on the last queries. Dense attention is another function: it has its own oracle."""

    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        if candidate.label != "dense":
            return super().check(candidate, direction)
        own = OpProblem(self.inputs, self.dense_standard(), self.dims, self.judged)
        return own.check(candidate, direction)

    def dense_standard(self) -> Standard:
        last = last_queries(self.inputs, self.judged)
        c = last.case
        case = dense_spec.Case(c.name, c.B, c.Hq, c.Hkv, c.Nq, c.Nk, c.D, c.Dv, is_causal=True)
        return dense_testing.make_standard(
            dense_testing.Inputs(
                case, last.q, last.k, last.v, None, None, None, last.dout, None, dropout_seed=0
            )
        )


def last_queries(inputs: Inputs, judged: slice | torch.Tensor) -> Inputs:
    """The problem of some queries at the end: their positions stay what they are."""
    q, dout, indices = (t[:, :, judged] for t in (inputs.q, inputs.dout, inputs.indices))
    case = replace(inputs.case, Nq=q.shape[2])
    return replace(inputs, case=case, q=q, dout=dout, indices=indices)


class SelectedAttentionSuite(Suite):
    """The sizes of the NSA paper and those of the package, over length and group size."""

    name = "selected_attention"
    peers: ClassVar = {
        "eager": "eager reference (dense mask)",
        "dense": "hk.attention, dense and causal",
    }
    yardstick = "dense"
    cases = SPEED
    sweeps = (
        Sweep(
            "time",
            "Selected attention, 16 heads share 1, D 128, 16 blocks of 64",
            "N",
            {c.name: c.Nq for c in SPEED if c.group == "paper" and c.D == 128},
        ),
        Sweep(
            "small-time",
            "Selected attention, 8 heads share 2, D 64, 4 blocks of 16",
            "N",
            {c.name: c.Nq for c in SPEED if c.group == "small"},
        ),
    )
    memory = MemorySweep(
        "causal, 4 heads share 1, D 64, 4 blocks of 16",
        _memory_case,
        rows=("cpu", "eager"),
        lengths=(1024, 4096, 16384, 32768),
        quick_lengths=(),
        needs=lambda row, n: 10 * 4 * n * n * 4 if row == "eager" else 0,
    )

    def quick_dtypes(self, case: Case) -> Sequence[torch.dtype]:
        return (torch.float32,) if case.quick else ()  # oracle and eager are slow

    def rows(self, case: Case, device: str, full: bool) -> list[str]:
        scores = case.B * case.Hq * case.Nq * case.Nk
        rows = list(BACKEND_ROWS[device])
        if scores <= EAGER_SCORES:
            rows.append("eager")
        if full and scores <= DENSE_SCORES:  # the oracle of dense gradients takes seconds
            rows.append("dense")
        return rows

    def shape(self, case: Case) -> list[int]:
        return [case.B, case.Hq, case.Hkv, case.Nq, case.Nk, case.D, case.Dv, case.S, case.n]

    def inputs(self, case: Case, dtype: torch.dtype, device: str) -> Inputs:
        return testing.make_inputs(case, dtype, device)

    def problem(self, case: Case, dtype: torch.dtype, device: str) -> OpProblem:
        inputs = self.inputs(case, dtype, device)
        count = max(8, min(case.Nq, JUDGED_SCORES // (case.B * case.Hq * case.Nk)))
        judged = slice(case.Nq - count, case.Nq)
        standard = testing.make_standard(last_queries(inputs, judged))
        return SelectedProblem(inputs, standard, {"out": 2, "dq": 2}, judged)

    def candidates(self, row: str, inputs: Inputs, direction: str) -> Iterator[Candidate]:
        if row in dispatch.BACKENDS:
            yield _backend(row, inputs)
        elif row == "eager":
            yield Candidate(lambda i: reference.selected_attention(i.call())[0], inputs)
        elif row == "dense":
            yield Candidate(lambda i: hk.attention(i.q, i.k, i.v, is_causal=True), inputs, row)
        else:
            raise ValueError(f"unknown row {row!r}")


def _backend(name: str, inputs: Inputs) -> Candidate:
    try:
        dispatch.resolve("selected_attention", inputs.call(), name)
    except NotImplementedError as error:
        raise Unsupported(str(error)) from error
    return Candidate(lambda i: i.run(name)[0], inputs)


SUITE = SelectedAttentionSuite()
