"""Compiles the kernels of both norms for GPUs that are not there and reports what they use.

    python -m hierkernels.ops.rms_norm.aot [--full] [--arch 80 90 100] [--jobs 2] [--json FILE]

See hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from hierkernels.ops.rms_norm.api import make_call
from hierkernels.ops.rms_norm.triton import plan_backward, plan_forward
from hierkernels.triton_common.aot import main
from hierkernels.triton_common.launch import Launch, Target


@dataclass(frozen=True)
class Case:
    """A call to compile: channels, dtypes of x and of the result, token shift."""

    name: str
    channels: int
    dtype: str = "float32"
    to: str = "bfloat16"
    shift: int = 1
    bias: bool = False  # a layer norm
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("shifted", 512, quick=True),
    Case("plain", 768, "bfloat16", shift=0, quick=True),
    Case("layer", 768, bias=True, quick=True),
    Case("layer-wide", 8192, "bfloat16", shift=0, bias=True),
    Case("narrow", 96, "float16", "float32"),
    Case("wide", 8192, "bfloat16"),
    Case("long", 12288, "bfloat16", quick=True),
    Case("layer-long", 16384, shift=0, bias=True),
)


def spill_limit(case: Case) -> float:
    """None may spill."""
    return 0


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The launches of a case: forward, then backward."""
    to = getattr(torch, case.to)
    x = torch.empty(8, 1024, case.channels, dtype=getattr(torch, case.dtype), device=device)
    weight = torch.empty(case.channels, dtype=x.dtype, device=device)
    bias = torch.empty_like(weight) if case.bias else None
    call = make_call(x, weight, bias=bias, shift=case.shift, dtype=to)
    out, inverse, mean = call.new_outputs()
    return [
        *plan_forward(call, target, out, inverse, mean),
        *plan_backward(call, target, inverse, mean, out, x)[0],
    ]


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.rms_norm.aot"], __doc__))
