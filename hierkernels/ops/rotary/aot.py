"""Compiles the rotary kernel for GPUs that are not there and reports what it uses.

    python -m hierkernels.ops.rotary.aot [--full] [--arch 80 90 100] [--jobs 2] [--json FILE]

See hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from hierkernels.ops.rotary.api import make_call
from hierkernels.ops.rotary.triton import plan as plan_launch
from hierkernels.triton_common.aot import main
from hierkernels.triton_common.launch import Launch, Target


@dataclass(frozen=True)
class Case:
    """A call to compile."""

    name: str
    channels: int
    heads: int
    dtype: str = "bfloat16"
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("heads-8", 64, 8, quick=True),
    Case("float32", 128, 4, dtype="float32", quick=True),
    Case("one-head", 64, 1),
    Case("channels-80", 80, 6, dtype="float16"),
    Case("channels-256", 256, 8),
)


def spill_limit(case: Case) -> float:
    """None may spill."""
    return 0


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The one launch of a case, heads beside channels."""
    shape = (4, 4096, case.heads, case.channels)
    x = torch.empty(shape, dtype=getattr(torch, case.dtype), device=device).transpose(1, 2)
    table = torch.empty(4096, case.channels // 2, device=device)
    call = make_call(x, table, table)
    return [plan_launch(call, target, call.new_output())]


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.rotary.aot"], __doc__))
