"""The CUDA attention kernels on a GPU: what the emulated tests hold, on the real thing."""

from __future__ import annotations

import pytest
import torch
from hopper_cases import NOT_SERVED, SERVED

from hierkernels.ops.attention.spec import CORRECTNESS, Case
from hierkernels.testing import case_ids, check_accuracy, compute, make_inputs, poisoned_memory

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CASES = [
    pytest.param(c, d, id=f"attention-cuda-{name}") for name, c, d in case_ids(CORRECTNESS, DTYPES)
]
_CASES += [
    pytest.param(c, d, id=f"attention-cuda-{name}")
    for name, c, d in case_ids((*SERVED, *NOT_SERVED), (torch.bfloat16, torch.float16))
]


@pytest.mark.parametrize(("case", "dtype"), _CASES)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, "cuda")
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)


def test_gradients_are_bitwise_repeatable() -> None:
    (case,) = (c for c in CORRECTNESS if c.name == "everything")
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    first = compute(inputs, "cuda")
    for _ in range(5):
        for name, result in compute(inputs, "cuda").items():
            assert torch.equal(result, first[name]), name


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    """Tokens 2**26 elements apart: the offset of token 33 exceeds 2**31."""
    case = Case("far", 1, 1, 1, 66, 66, 64, 64, is_causal=True)
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    memory = torch.empty(66 * 2**26, dtype=torch.bfloat16, device="cuda")
    far = memory.as_strided(inputs.k.shape, (0, 0, 2**26, 1))
    far.copy_(inputs.k)
    results = compute(type(inputs)(**{**vars(inputs), "k": far}), "cuda")
    check_accuracy(inputs, results)
