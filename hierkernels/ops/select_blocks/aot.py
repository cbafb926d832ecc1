"""Compiles the kernels of block selection for GPUs that are not there and reports what they use.

    python -m hierkernels.ops.select_blocks.aot [--full] [--arch 80 90 100] [--jobs 2]

See hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from hierkernels.ops.select_blocks import triton_launch
from hierkernels.ops.select_blocks.api import make_call
from hierkernels.triton_common.aot import main, new_tensor
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.search import Space


@dataclass(frozen=True)
class Case:
    """A call to compile: shapes, dtype and options of hk.select_blocks."""

    name: str
    channels: int
    heads: int
    kv_heads: int
    window: int
    stride: int
    block: int
    selected: int
    scoring: str = "probability"
    dtype: str = "bfloat16"
    tokens: int = 16384
    queries: int | None = None
    shared: bool = True
    quick: bool = False  # part of the set for continuous integration


CASES = (
    # The shapes of native sparse attention, and those of the package.
    Case("paper", 128, 64, 4, 32, 16, 64, 16, quick=True),
    Case("package", 64, 8, 2, 16, 8, 16, 4, "logit", quick=True),
    Case("paper-logit", 128, 64, 4, 32, 16, 64, 16, "logit"),
    Case("package-probability", 64, 8, 2, 16, 8, 16, 4),
    Case("not-shared", 128, 8, 2, 32, 16, 64, 16, shared=False),
    Case("decode", 128, 64, 4, 32, 16, 64, 16, queries=1),
    Case("decode-logit", 64, 8, 2, 16, 8, 16, 4, "logit", queries=1),
    Case("float16", 128, 64, 4, 32, 16, 64, 16, dtype="float16"),
    Case("wide", 256, 16, 2, 32, 16, 64, 16),
    Case("wide-logit", 256, 16, 2, 32, 16, 64, 16, "logit"),
    Case("odd", 80, 8, 2, 32, 16, 64, 5),
    Case("select-64", 128, 64, 4, 32, 16, 64, 64),
    Case("float32", 64, 8, 2, 16, 8, 16, 4, dtype="float32"),
    Case("float32-logit", 128, 8, 2, 16, 8, 16, 4, "logit", dtype="float32"),
)

# Calls that fill a large device, for `python -m hierkernels.tune`.
TUNING = (
    Case("paper", 128, 64, 4, 32, 16, 64, 16),
    Case("package", 64, 8, 2, 16, 8, 16, 4),
    Case("package-logit", 64, 8, 2, 16, 16, 16, 4, scoring="logit"),
)
SPACES = {
    "select_blocks_probability": Space((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)),
    "select_blocks_logit": Space((32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3)),
}


def spill_limit(case: Case) -> float:
    """Bytes of spill stores that a case may have."""
    if case.dtype == "float32":
        return float("inf")  # without tensor cores, arithmetic is what takes the time
    # Mean queries in float32, each as the sum of three, are as many registers as a thread has.
    return 256 if case.scoring == "logit" and case.channels > 128 else 0


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The launch of a case."""
    elements: torch.dtype = getattr(torch, case.dtype)
    queries = case.queries or case.tokens
    windows = (case.tokens - case.window) // case.stride + 1
    q = new_tensor(device, 1, case.heads, queries, case.channels, dtype=elements)
    k = new_tensor(device, 1, case.kv_heads, windows, case.channels, dtype=elements)
    options: dict[str, Any] = {}
    if case.scoring == "probability":
        lse = new_tensor(device, *q.shape[:3], dtype=torch.float32)
        options = {"lse": lse, "window_size": case.window, "num_initial": 1, "num_local": 2}
    call = make_call(
        q, k, num_selected=case.selected, block_size=case.block, stride=case.stride,
        first_end=case.window - 1, scoring=case.scoring, num_keys=case.tokens,
        query_offset=case.tokens - queries, shared=case.shared, **options,
    )  # fmt: skip
    return [triton_launch.plan(call, target, call.new_indices())]


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.select_blocks.aot"], __doc__))
