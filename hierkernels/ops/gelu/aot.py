"""Compiles the gelu kernels for GPUs that are not there and reports what they use.

    python -m hierkernels.ops.gelu.aot [--full] [--arch 80 90 100] [--jobs 2] [--json FILE]

See hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from hierkernels.ops.gelu.api import make_call
from hierkernels.ops.gelu.triton import plan_backward, plan_forward
from hierkernels.triton_common.aot import main
from hierkernels.triton_common.launch import Launch, Target


@dataclass(frozen=True)
class Case:
    """A call to compile."""

    name: str
    channels: int
    dtype: str = "bfloat16"
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("plain", 1024),
    Case("halves", 1024, quick=True),
    Case("gated", 682, "float32", quick=True),
)


def spill_limit(case: Case) -> float:
    """None may spill."""
    return 0


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The launches of a case, named by its form: forward, then backward."""
    x = torch.empty(4096, case.channels, dtype=getattr(torch, case.dtype), device=device)
    call = make_call(x, case.name)
    outputs = call.new_outputs()
    return [plan_forward(call, target, *outputs), plan_backward(call, target, *outputs, x)]


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.gelu.aot"], __doc__))
