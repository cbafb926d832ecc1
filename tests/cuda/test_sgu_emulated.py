"""hk.causal_sgu on the CUDA kernels, run by the emulation, against the float64 oracle.

Lengths are small because an emulated product takes microseconds; tiles have 128 rows (64 of the float32 weight's
gradient), so that a few cases are long enough for tiles above, on and below the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from hierkernels import cuda_core
from hierkernels.ops.causal_sgu import cuda as backend
from hierkernels.ops.causal_sgu.spec import CORRECTNESS, Case, dtype_name
from hierkernels.ops.causal_sgu.testing import check_accuracy, compute, make_inputs, make_standard
from hierkernels.testing import poisoned_memory

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def emulated(emulation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(cuda_core, "emulated_core", emulation)
    return emulation


def _table() -> Iterator[tuple[Case, torch.dtype]]:
    dtypes = (F32, BF16, F16)
    for i, case in enumerate(CORRECTNESS):
        for n, dtype in enumerate(dtypes):
            yield case, dtype


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"causal_sgu-cuda-{dtype_name(d)}-{c.name}") for c, d in _table() if d in c.dtypes],
)
def test_accuracy(case: Case, dtype: torch.dtype, emulated: ModuleType) -> None:
    emulated.set_options(seed=hash(case.name) % 1000 + 1)
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)
