"""hk.local_attention on the CUDA kernels, emulated: the bias by slots and the zero look-back.

It is hk.attention with another key range, and key ranges are tested there.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from hierkernels.ops.attention.spec import dtype_name
from hierkernels.ops.local_attention.spec import CORRECTNESS, LocalCase
from hierkernels.ops.local_attention.testing import make_inputs, make_standard
from hierkernels.testing import check_accuracy, compute, poisoned_memory

F32, BF16 = torch.float32, torch.bfloat16
IN_FLOAT32 = ("bias", "bias-both", "bias-g3", "dropout-bias", "zero-bias")


def _parameters() -> list:
    table = [(case, BF16) for case in CORRECTNESS if case.bias or case.zero_lookback]
    table += [(case, F32) for case in CORRECTNESS if case.name in IN_FLOAT32]
    return [
        pytest.param(case, dtype, id=f"local_attention-cuda-{dtype_name(dtype)}-{case.name}")
        for case, dtype in table
        if dtype in case.dtypes
    ]


@pytest.mark.parametrize(("case", "dtype"), _parameters())
def test_accuracy(emulated_cuda: ModuleType, case: LocalCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results, make_standard(inputs))
