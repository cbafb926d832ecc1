"""The accuracy cases of an operator at every instruction set whose kernels are its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hierkernels.native import kernels_of, native
from hierkernels.testing import case_ids

CORE = native()
ISAS: list[str] = CORE.cpu_isas() if CORE else []


def accuracy_params(op: str, cases: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Any]:
    """Parameters (case, dtype, instruction set); levels are told apart by float32 kernels."""
    return [
        pytest.param(case, dtype, isa, id=f"{op}-{isa}-{name}")
        for name, case, dtype in case_ids(cases, dtypes)
        for isa in ISAS
        if isa == ISAS[-1] or kernels_of(isa, torch.float32) != kernels_of(ISAS[-1], torch.float32)
    ]
