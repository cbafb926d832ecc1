"""Compiles the kernel of the gated sum for GPUs that are not there and reports what it uses.

    python -m hierkernels.ops.native_sparse_attention.aot [--full] [--arch 80 90 100] [--jobs 2]

The branches' kernels are compiled by their own operators. See hierkernels/triton_common/aot.py for
what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from hierkernels.ops.native_sparse_attention.triton_gated_sum import plan_backward, plan_forward
from hierkernels.triton_common.aot import main
from hierkernels.triton_common.launch import Launch, Target


@dataclass(frozen=True)
class Case:
    """A sum to compile."""

    name: str
    channels: int
    heads: int
    dtype: str = "bfloat16"
    tokens: int = 16384
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("paper", 128, 64, quick=True),
    Case("package", 64, 8, dtype="float32", quick=True),
    Case("decode", 128, 64, tokens=1),
    Case("channels-80", 80, 6, dtype="float16"),
    Case("channels-256", 256, 8),
)


def spill_limit(case: Case) -> float:
    """None may spill."""
    return 0


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The launches of a case: forward and backward, tensors with heads beside channels."""
    elements: torch.dtype = getattr(torch, case.dtype)

    def empty(channels: int) -> torch.Tensor:
        shape = (1, case.tokens, case.heads, channels)
        return torch.empty(shape, dtype=elements, device=device).transpose(1, 2)

    gates, dgates = empty(3), empty(3)
    first, second, third, out = (empty(case.channels) for _ in range(4))
    parts = first, second, third
    return [
        plan_forward(gates, parts, out, target),
        plan_backward(gates, parts, out, dgates, parts, target),
    ]


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.native_sparse_attention.aot"], __doc__))
