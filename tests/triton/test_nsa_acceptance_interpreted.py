"""The acceptance cases of native sparse attention on the Triton backend, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.native_sparse_attention.acceptance import CASES, Acceptance
from hierkernels.testing import case_ids

_INTERPRETED = tuple(case for case in CASES if case.interpreted)


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"native_sparse_attention-triton-{name}")
        for name, case, dtype in case_ids(_INTERPRETED, (torch.float32,))
    ],
)
def test_acceptance(case: Acceptance, dtype: torch.dtype) -> None:
    case.check("triton", dtype)
