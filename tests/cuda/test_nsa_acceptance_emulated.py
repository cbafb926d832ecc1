"""The acceptance cases of native sparse attention on the CUDA kernels, emulated."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from hierkernels.ops.native_sparse_attention.acceptance import CASES, Acceptance
from hierkernels.testing import case_ids


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"native_sparse_attention-cuda-{name}")
        for name, case, dtype in case_ids(CASES, (torch.bfloat16,))
    ],
)
def test_acceptance(emulated_cuda: ModuleType, case: Acceptance, dtype: torch.dtype) -> None:
    case.check("cuda", dtype)
