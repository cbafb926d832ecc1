"""Compiles the causal_sgu kernels for GPUs that are not there and reports what they use.

    python -m hierkernels.ops.causal_sgu.aot [--full] [--arch 80 90 100] [--jobs 2] [--json FILE]

See hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from hierkernels.ops.causal_sgu.api import make_call
from hierkernels.ops.causal_sgu.triton_launch import plan_forward, plan_gate, plan_mix, plan_weight
from hierkernels.triton_common.aot import main, new_tensor
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.search import Space


@dataclass(frozen=True)
class Case:
    """A call to compile: shapes, dtypes and options of hk.causal_sgu; 4 heads."""

    name: str
    channels: int  # of a head
    dtype: str = "bfloat16"
    weight: str = "float32"
    tokens: int = 2048
    window: int | None = None
    activation: str | None = None
    gate_residual: bool = False
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("global", 256, quick=True),
    Case("window", 256, tokens=16384, window=128, quick=True),
    Case("gelu", 256, activation="gelu", gate_residual=True, quick=True),
    Case("float32", 256, dtype="float32", quick=True),
    Case("half-weight", 256, weight="bfloat16"),
    Case("float16", 128, dtype="float16"),
    Case("narrow", 40, activation="silu"),
    Case("short", 256, tokens=60, activation="tanh", gate_residual=True),
    Case("odd-window", 64, tokens=5000, window=100),
    Case("float32-window", 64, dtype="float32", tokens=5000, window=100, activation="sigmoid"),
)

# Calls that fill a large device, for `python -m hierkernels.tune`.
TUNING = (Case("tune", 256, tokens=2048), Case("tune-window", 256, tokens=16384, window=128))
_SPACE = Space((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4), block_k=(32, 64))
SPACES = {
    "causal_sgu_forward": _SPACE,
    "causal_sgu_backward_gate": _SPACE,
    "causal_sgu_backward_weight": _SPACE,
}


def spill_limit(case: Case) -> float:
    """Bytes of spill stores that a case may have: none."""
    return 0


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The launches of a case: forward, then backward."""
    dtype, parameters = getattr(torch, case.dtype), getattr(torch, case.weight)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return new_tensor(device, *shape, dtype=dtype)

    B, H, N, C = 4, 4, case.tokens, 4 * case.channels
    w = case.window
    rows, columns = (N, N) if w is None else (w, 2 * w)
    x = new(B, N, C)
    call = make_call(
        x, x, new(H, rows, columns, dtype=parameters), new(H, rows, dtype=parameters), window=w,
        gate_residual=x if case.gate_residual else None, activation=case.activation,
    )  # fmt: skip
    sums = new(B, N, H, dtype=torch.float32)
    return [
        *plan_forward(call, target, x, x),
        *plan_mix(call, target, x, x, x, x, sums),
        *plan_gate(call, target, x, x),
        *plan_weight(call, target, x)[0],
    ]


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.causal_sgu.aot"], __doc__))
