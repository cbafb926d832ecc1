"""hk.compressed_attention against its eager reference and SDPA with a dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F

from benchmarks.suite import BACKEND_ROWS, Candidate, OpProblem, Suite, Sweep, Unsupported
from benchmarks.suites.attention import CHECK_SCORES, CHECK_START, backend_candidate
from hierkernels import dispatch
from hierkernels.ops.compressed_attention import reference, testing
from hierkernels.ops.compressed_attention.spec import SPEED, CompressedCase
from hierkernels.ops.compressed_attention.testing import CompressedInputs

CHECK_STEP = 64  # a large case is checked on every 64th query: a multiple of every stride
EAGER_SCORES = 2**26


class CompressedAttentionSuite(Suite):
    """The sizes of the NSA paper and those of the package, over length."""

    name = "compressed_attention"
    peers: ClassVar = {
        "eager": "eager reference (dense)",
        "sdpa": "F.scaled_dot_product_attention, dense mask",
    }
    yardstick = "sdpa"
    cases = SPEED
    sweeps = (
        Sweep(
            "time",
            "Compressed attention, 8 heads share 2, D 64, a token for every 8",
            "N",
            {c.name: c.Nq for c in SPEED if c.D == 64},
        ),
    )

    def rows(self, case: CompressedCase, device: str, full: bool) -> list[str]:
        eager = case.B * case.Hq * case.Nq * case.Nk <= EAGER_SCORES
        return [*BACKEND_ROWS[device], *(["eager"] if eager else []), "sdpa"]

    def shape(self, case: CompressedCase) -> list[int]:
        return [case.B, case.Hq, case.Hkv, case.Nq, case.Nk, case.D, case.Dv, case.stride]

    def inputs(self, case: CompressedCase, dtype: torch.dtype, device: str) -> CompressedInputs:
        return testing.make_inputs(case, dtype, device)

    def problem(self, case: CompressedCase, dtype: torch.dtype, device: str) -> OpProblem:
        inputs = self.inputs(case, dtype, device)
        if case.B * case.Hq * case.Nq * case.Nk <= CHECK_SCORES:
            return OpProblem(inputs, testing.make_standard(inputs), {"out": 2})
        queries = {"out": 2, "dq": 2}
        standard = testing.make_standard(inputs.as_attention().thin(CHECK_START, CHECK_STEP))
        return OpProblem(inputs, standard, queries, slice(CHECK_START, None, CHECK_STEP))

    def candidates(self, row: str, inputs: CompressedInputs, direction: str) -> Iterator[Candidate]:
        if row in dispatch.BACKENDS:
            yield backend_candidate(row, inputs)
        elif row == "eager":
            yield Candidate(_eager, inputs)
        elif row == "sdpa":
            if direction == "backward" and inputs.q.dtype == torch.bfloat16:
                raise Unsupported("its gradients of grouped keys err more than the rule allows")
            yield _sdpa(inputs)
        else:
            raise ValueError(f"unknown row {row!r}")


def _eager(inputs: CompressedInputs) -> torch.Tensor:
    return reference.compressed_attention(inputs.compressed_call())[0]


def _sdpa(inputs: CompressedInputs) -> Candidate:
    """A dense mask, made outside of the timing; a query that sees nothing gets 0 from it, too."""
    case = inputs.case
    mask = case.visible_range.mask(case.Nq, case.Nk, inputs.q.device)

    def attend(i: CompressedInputs) -> torch.Tensor:
        return F.scaled_dot_product_attention(i.q, i.k, i.v, attn_mask=mask, enable_gqa=True)

    return Candidate(attend, inputs)


SUITE = CompressedAttentionSuite()
