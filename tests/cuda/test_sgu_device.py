"""The CUDA kernels of the gating unit on a GPU: what the emulated tests hold, on the real thing."""

from __future__ import annotations

import pytest
import torch

from hierkernels.ops.causal_sgu.spec import CORRECTNESS, Case
from hierkernels.ops.causal_sgu.testing import check_accuracy, compute, make_inputs
from hierkernels.testing import case_ids, poisoned_memory

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# More blocks than a device runs at once, and tiles that are split and not.
LARGE = (
    Case("large", 2, 1500, 512, 2, mixed=True, gate_residual=True, activation="gelu"),
    Case("large-window", 2, 3000, 512, 2, window=256, activation="silu"),
)
_CASES = [
    pytest.param(c, d, id=f"causal_sgu-cuda-{name}")
    for name, c, d in case_ids((*CORRECTNESS, *LARGE), DTYPES)
]


@pytest.mark.parametrize(("case", "dtype"), _CASES)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, "cuda")
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_gradients_are_bitwise_repeatable(case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    first = compute(inputs, "cuda")
    for _ in range(5):
        for name, result in compute(inputs, "cuda").items():
            assert torch.equal(result, first[name]), name
