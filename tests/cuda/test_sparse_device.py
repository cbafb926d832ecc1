"""The CUDA kernels of selected attention and block selection on a GPU, as on the emulation."""

from __future__ import annotations

import pytest
import torch

from hierkernels.ops.native_sparse_attention import testing as nsa_testing
from hierkernels.ops.native_sparse_attention.spec import CORRECTNESS as NSA_CASES
from hierkernels.ops.native_sparse_attention.spec import NsaCase
from hierkernels.ops.select_blocks import testing as select_testing
from hierkernels.ops.select_blocks.spec import CORRECTNESS as SELECT_CASES
from hierkernels.ops.select_blocks.spec import SelectCase
from hierkernels.ops.selected_attention import testing as selected_testing
from hierkernels.ops.selected_attention.cuda import MAX_DIM
from hierkernels.ops.selected_attention.spec import CORRECTNESS as SELECTED_CASES
from hierkernels.ops.selected_attention.spec import Case
from hierkernels.testing import case_ids, compute, poisoned_memory

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NARROW = [c for c in SELECTED_CASES if max(c.D, c.Dv) <= MAX_DIM]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, d, id=f"selected_attention-cuda-{n}")
        for n, c, d in case_ids(_NARROW, DTYPES)
    ],
)
def test_selected_attention(case: Case, dtype: torch.dtype) -> None:
    inputs = selected_testing.make_inputs(case, dtype, "cuda")
    with poisoned_memory():
        results = compute(inputs, "cuda")
    selected_testing.check_accuracy(inputs, results)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, d, id=f"select_blocks-cuda-{n}")
        for n, c, d in case_ids(SELECT_CASES, DTYPES)
    ],
)
def test_select_blocks(case: SelectCase, dtype: torch.dtype) -> None:
    inputs = select_testing.make_inputs(case, dtype, "cuda")
    with poisoned_memory():
        indices = inputs.run("cuda")
    select_testing.check_selection(inputs, indices)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, d, id=f"native_sparse_attention-cuda-{n}")
        for n, c, d in case_ids(NSA_CASES, (torch.bfloat16, torch.float32))
    ],
)
def test_native_sparse_attention(case: NsaCase, dtype: torch.dtype) -> None:
    nsa_testing.check_accuracy(nsa_testing.make_inputs(case, dtype, "cuda"), "cuda")


def test_gradients_are_bitwise_repeatable() -> None:
    """Block selection included: the same blocks, the same sums."""
    (case,) = (c for c in SELECTED_CASES if c.name == "everything")
    inputs = selected_testing.make_inputs(case, torch.bfloat16, "cuda")
    first = compute(inputs, "cuda")
    for _ in range(5):
        for name, result in compute(inputs, "cuda").items():
            assert torch.equal(result, first[name]), name
