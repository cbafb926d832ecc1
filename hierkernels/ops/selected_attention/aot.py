"""Compiles the kernels of selected attention for GPUs that are not there and reports what they use.

    python -m hierkernels.ops.selected_attention.aot [--full] [--arch 80 90 100] [--jobs 2]

See hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from hierkernels.ops.selected_attention.api import make_call
from hierkernels.ops.selected_attention.triton_launch import (
    inverse_of,
    plan_forward,
    plan_keys,
    plan_queries,
)
from hierkernels.triton_common.aot import main, new_tensor
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.search import Space
from hierkernels.triton_common.tiles import cdiv


@dataclass(frozen=True)
class Case:
    """A call to compile: shapes, dtype and options of hk.selected_attention."""

    name: str
    channels: int
    heads: int
    kv_heads: int
    block_size: int
    named: int
    dtype: str = "bfloat16"
    tokens: int = 16384
    queries: int | None = None
    per_head: bool = False
    own: bool = False
    weights: bool = False
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("paper", 128, 64, 4, 64, 16, quick=True),  # the shapes of native sparse attention
    Case("package", 64, 8, 2, 16, 4, own=True, quick=True),
    Case("weights", 64, 8, 2, 16, 4, own=True, weights=True, quick=True),
    Case("decode", 128, 64, 4, 64, 16, queries=1),
    Case("paper-192", 192, 64, 4, 64, 16),
    Case("paper-64", 64, 64, 4, 64, 16),
    Case("float16", 128, 64, 4, 64, 16, dtype="float16"),
    Case("per-head", 128, 8, 8, 64, 16, per_head=True),
    Case("group-128", 128, 128, 1, 64, 16),
    Case("group-20", 80, 40, 2, 64, 16),
    Case("block-4", 64, 8, 2, 4, 4, own=True),
    Case("block-20", 64, 8, 2, 20, 4, own=True),
    Case("block-128", 128, 16, 2, 128, 8),
    Case("weights-paper", 128, 64, 4, 64, 16, weights=True),
    Case("float32", 64, 8, 2, 16, 4, dtype="float32", own=True),
    Case("float32", 128, 64, 4, 64, 16, dtype="float32"),
)

# Calls that fill a large device, for `python -m hierkernels.tune`.
TUNING = (
    Case("paper", 128, 64, 4, 64, 16),
    Case("package", 64, 8, 2, 16, 4),
    Case("per-head", 128, 16, 4, 64, 16, per_head=True),
)
SPACES = {
    "selected_attention_forward": Space((16,), (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3, 4)),
    "selected_attention_backward_dq": Space((16,), (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3)),
    "selected_attention_backward_dkv": Space((16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3)),
}


def spill_limit(case: Case) -> float:
    """Bytes of spill stores that a case may have."""
    # Without tensor cores, arithmetic is what takes the time.
    return float("inf") if case.dtype == "float32" else 0


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The launches of a case: forward, then backward with the gradient of the weights."""
    elements: torch.dtype = getattr(torch, case.dtype)

    def new(*shape: int, dtype: torch.dtype = elements) -> torch.Tensor:
        return new_tensor(device, *shape, dtype=dtype)

    queries, heads = case.queries or case.tokens, case.heads if case.per_head else case.kv_heads
    indices = new(1, heads, queries, case.named, dtype=torch.int32)
    if device != "meta":
        indices.random_(0, cdiv(case.tokens, case.block_size))
    call = make_call(
        new(1, case.heads, queries, case.channels),
        new(1, case.kv_heads, case.tokens, case.channels),
        new(1, case.kv_heads, case.tokens, case.channels),
        indices, block_size=case.block_size, include_own_block=case.own,
        block_weights=new(*indices.shape) if case.weights else None,
    )  # fmt: skip
    out, lse = call.new_outputs()
    dq, dk, dv = call.new_gradients()
    dweights = call.new_weights_gradient() if case.weights else None
    launches, lists, stats = plan_queries(call, target, (out, lse), (out, lse), dq, dweights)
    if device != "meta":  # the inverse is made from lists that are filled
        launches[0].run()
    keys = plan_keys(call, target, inverse_of(call, target, lists), stats, out, dk, dv)
    return [*plan_forward(call, target, out, lse), launches[-1], *keys]


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.selected_attention.aot"], __doc__))
