"""hk.compressed_attention on the Triton backend, interpreted on the CPU, against its own oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.compressed_attention.spec import CORRECTNESS
from hierkernels.ops.compressed_attention.testing import make_inputs
from hierkernels.testing import check_accuracy, compute, make_standard, poisoned_memory

CASES = {case.name: case for case in CORRECTNESS}
NAMES = (
    "n1", "n15", "n16", "n63", "n65", "n15-padded-memory", "n65-padded-memory", "n0-memory",
    "gaps", "memory4-strict", "memory-beyond-a-tile", "not-causal", "offset",
    "offset-one-query-memory", "g3", "g6", "g20", "lse-grad-memory-g4", "logits-x100",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(name, torch.float32, id=f"compressed-float32-{name}") for name in NAMES),
        pytest.param("g6", torch.bfloat16, id="compressed-bfloat16-g6"),
    ],
)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(replace(CASES[name], B=1), dtype)
    with poisoned_memory():
        results = compute(inputs, "triton")
    check_accuracy(inputs, results, make_standard(inputs))
