"""hk.compressed_attention through the compiled CPU kernels, against its own float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

import hierkernels as hk
from hierkernels.native import native, native_error
from hierkernels.ops.attention.spec import ALL_DTYPES
from hierkernels.ops.compressed_attention.spec import CORRECTNESS, CompressedCase
from hierkernels.ops.compressed_attention.testing import make_inputs
from hierkernels.testing import (
    case_ids,
    check_accuracy,
    compute,
    make_standard,
    poisoned_memory,
    threads,
)

if native() is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"compressed_attention-{name}")
        for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
    ],
)
def test_accuracy(case: CompressedCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    standard = make_standard(inputs)
    with threads(2), poisoned_memory():
        results = compute(inputs, "cpu")
    check_accuracy(inputs, results, standard)


def _tensors(N: int, W: int, H: int = 2, Hkv: int = 1, D: int = 8) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(1, H, N, D, dtype=torch.float64),
        torch.randn(1, Hkv, W, D, dtype=torch.float64),
        torch.randn(1, Hkv, W, D, dtype=torch.float64),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("strict", [False, True], ids=["inclusive", "strict"])
@pytest.mark.parametrize("memory", [0, 2])
def test_visible_keys_are_those_of_the_words(backend: str, strict: bool, memory: int) -> None:
    """Loops in place of staircases: with equal scores, lse is the log of the number of keys."""
    stride, first_end, offset, N, W = 3, 4, 2, 20, 6
    q, k, v = _tensors(N, memory + W)
    _, lse = hk.compressed_attention(
        q * 0, k, v, stride=stride, first_end=first_end, num_memory=memory, strict=strict,
        query_offset=offset, return_lse=True, backend=backend,
    )  # fmt: skip
    for i in range(N):
        ended = sum(first_end + w * stride + strict <= i + offset for w in range(W))
        assert math.isclose(lse[0, 0, i].exp(), memory + ended, abs_tol=1e-12), i


@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("strict", [False, True], ids=["inclusive", "strict"])
def test_gradcheck(memory: int, strict: bool) -> None:
    q, k, v = (t.requires_grad_() for t in _tensors(9, memory + 3, D=3))

    def f(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = hk.compressed_attention(
            *tensors, stride=2, first_end=3, num_memory=memory, strict=strict, query_offset=1,
            return_lse=True, backend="cpu",
        )  # fmt: skip
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(f, (q, k, v))
