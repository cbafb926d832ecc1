"""The acceptance cases of native sparse attention on the CPU's kernels and on the reference."""

from __future__ import annotations

import pytest
import torch

from hierkernels.native import native
from hierkernels.ops.attention.spec import ALL_DTYPES
from hierkernels.ops.native_sparse_attention.acceptance import CASES, Acceptance
from hierkernels.testing import case_ids

# The reference is what others are judged by; its meaning is judged in float64.
_REFERENCE = [("reference", *entry) for entry in case_ids(CASES, (torch.float64,))]
_CPU = [("cpu", *entry) for entry in case_ids(CASES, ALL_DTYPES)] if native() is not None else []


@pytest.mark.parametrize(
    "backend, case, dtype",
    [
        pytest.param(backend, case, dtype, id=f"native_sparse_attention-{backend}-{name}")
        for backend, name, case, dtype in (*_CPU, *_REFERENCE)
    ],
)
def test_acceptance(backend: str, case: Acceptance, dtype: torch.dtype) -> None:
    case.check(backend, dtype)
