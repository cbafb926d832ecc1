"""hk.select_blocks against its eager reference, and beside the compressed attention it follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import hierkernels as hk
from benchmarks.suite import BACKEND_ROWS, Candidate, Problem, Suite, Sweep, Unsupported
from hierkernels import dispatch
from hierkernels.ops.compressed_attention import testing as compressed
from hierkernels.ops.compressed_attention.spec import CompressedCase
from hierkernels.ops.select_blocks import reference, testing
from hierkernels.ops.select_blocks.spec import SPEED, SelectCase
from hierkernels.ops.select_blocks.testing import Inputs

EAGER_SCORES = 2**26
JUDGED_QUERIES = 200  # the last ones


def _last_queries(inputs: Inputs, count: int) -> Inputs:
    """The problem of the last queries: their positions stay what they are."""
    case = inputs.case
    count = min(count, case.N)
    lse = None if inputs.lse is None else inputs.lse[:, :, -count:]
    case = replace(case, N=count, query_offset=case.query_offset + case.N - count)
    return replace(inputs, case=case, q=inputs.q[:, :, -count:], lse=lse)


def _compressed(inputs: Inputs) -> compressed.CompressedInputs:
    """The compressed attention of the same queries and keys; the keys are the values."""
    c = inputs.case
    case = CompressedCase(
        c.name, c.B, c.Hq, c.Hkv, c.N, c.W, c.D, c.D, is_causal=c.is_causal, stride=c.stride,
        first_end=c.first_end, strict=c.padded, query_offset=c.query_offset,
    )  # fmt: skip
    return compressed.CompressedInputs(
        case, inputs.q, inputs.k, inputs.k, None, None, None, torch.zeros_like(inputs.q), None, 0
    )


@dataclass(frozen=True)
class SelectProblem(Problem):
    """Judged on the last queries, by the rule of chosen blocks; there is no error to report."""

    inputs: Inputs

    def check(self, candidate: Candidate, direction: str) -> dict[str, float]:
        part = _last_queries(self.inputs, JUDGED_QUERIES)
        with torch.no_grad():
            out = candidate.function(candidate.inputs)[:, :, -part.case.N :]
        if candidate.label == "attention":  # another function, with its own oracle
            standard = compressed.make_standard(_compressed(part), gradients=False)
            return {name: e.largest for name, e in standard.check({"out": out}).items()}
        testing.check_selection(part, out)
        return {"out": 0.0}

    def bind(self, candidate: Candidate, direction: str) -> Callable[[], Sequence[torch.Tensor]]:
        def forward() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return (candidate.function(candidate.inputs),)

        return forward


class SelectBlocksSuite(Suite):
    """Both scorings, the sizes of the NSA paper and those of the package, over length."""

    name = "select_blocks"
    peers: ClassVar = {
        "eager": "eager reference (dense)",
        "compressed": "hk.compressed_attention on the same tokens",
    }
    yardstick = "compressed"
    directions = ("forward",)
    cases = SPEED
    sweeps = tuple(
        Sweep(
            f"{scoring}-time",
            f"Selection by {scoring}, 8 heads share 2, D 64, 4 blocks of 16",
            "N",
            {c.name: c.N for c in SPEED if c.D == 64 and c.scoring == scoring},
        )
        for scoring in ("probability", "logit")
    )

    def rows(self, case: SelectCase, device: str, full: bool) -> list[str]:
        eager = case.B * case.Hq * case.N * case.W <= EAGER_SCORES
        return [*BACKEND_ROWS[device], *(["eager"] if eager else []), "compressed"]

    def shape(self, case: SelectCase) -> list[int]:
        return [
            case.B, case.Hq, case.Hkv, case.N, case.W, case.D, case.window, case.stride,
            case.block, case.n,
        ]  # fmt: skip

    def inputs(self, case: SelectCase, dtype: torch.dtype, device: str) -> Inputs:
        return testing.make_inputs(case, dtype, device)

    def problem(self, case: SelectCase, dtype: torch.dtype, device: str) -> SelectProblem:
        return SelectProblem(self.inputs(case, dtype, device))

    def candidates(self, row: str, inputs: Inputs, direction: str) -> Iterator[Candidate]:
        if row in dispatch.BACKENDS:
            try:
                dispatch.resolve("select_blocks", inputs.call(), row)
            except NotImplementedError as error:
                raise Unsupported(str(error)) from error
            yield Candidate(
                lambda i: hk.select_blocks(i.q, i.k, backend=row, **i.options()), inputs
            )
        elif row == "eager":
            yield Candidate(lambda i: reference.forward(i.call()), inputs)
        elif row == "compressed":
            yield Candidate(lambda i: _compressed(i).run(None)[0], inputs, "attention")
        else:
            raise ValueError(f"unknown row {row!r}")


SUITE = SelectBlocksSuite()
