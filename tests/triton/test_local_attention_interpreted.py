"""hk.local_attention on the Triton backend, interpreted on the CPU, against the float64 oracle.

Key ranges are tested with attention; here it is the bias by slots and the zero look-back. Tiles
are 16 and 32 (triton_configs.INTERPRETER): windows below, at, across and above them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.attention import triton_configs
from hierkernels.ops.attention.spec import dtype_name
from hierkernels.ops.local_attention.spec import LocalCase
from hierkernels.ops.local_attention.testing import make_inputs, make_standard
from hierkernels.testing import check_accuracy, compute, poisoned_memory

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _case(name: str, N: int, w: int, B: int = 1, H: int = 2, D: int = 16, **options) -> LocalCase:
    Hkv = options.pop("Hkv", H)
    options = {"is_causal": True, "width": w} | options
    return LocalCase(name, B, H, Hkv, N, N, D, D, **options)


CASES = (
    (_case("plain", 70, 10), F32),
    (_case("both-exact", 70, 10, is_causal=False, exact_window=True), F32),
    (_case("bias", 70, 10, bias="slots"), F32),
    (_case("bias-bf16", 70, 16, bias="slots"), BF16),
    (_case("bias-f16", 50, 40, bias="slots"), F16),
    (_case("bias-w1", 9, 1, bias="slots"), F32),
    (_case("bias-n3", 3, 8, bias="slots"), F32),
    (_case("bias-both-batch", 45, 10, B=2, bias="slots", is_causal=False, padding="random"), F32),
    (_case("bias-exact-group", 45, 7, H=4, Hkv=2, bias="slots", exact_window=True), F32),
    (_case("bias-group-packed", 45, 20, H=2, Hkv=1, bias="slots", lse_grad=True), F32),
    (_case("bias-dropout", 45, 10, H=1, bias="slots", dropout_p=0.3), F32),
    (_case("zero", 45, 10, zero_lookback=True), F32),
    (
        _case("zero-bias", 45, 10, bias="slots", zero_lookback=True, padding="empty",
              look_backward=2, lse_grad=True),
        F32,
    ),
)  # fmt: skip


def _check(case: LocalCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        results = compute(inputs, "triton")
    check_accuracy(inputs, results, make_standard(inputs))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"local_attention-triton-{dtype_name(dtype)}-{case.name}")
        for case, dtype in CASES
    ],
)
def test_accuracy(case: LocalCase, dtype: torch.dtype) -> None:
    _check(case, dtype)


def test_dropout_in_tiles_that_start_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets move the tiles of dbias off the generator's periods of 64 keys; the mask is equal."""
    config = replace(triton_configs.INTERPRETER["dbias"], block_m=16, block_n=64)
    monkeypatch.setitem(triton_configs.INTERPRETER, "dbias", config)
    _check(_case("dropout-64", 50, 20, H=1, bias="slots", dropout_p=0.4), F32)


def test_bias_gradient_is_summed_in_slices() -> None:
    """A short bias and many buckets: every slice has its share, twice the same."""
    inputs = make_inputs(_case("slices", 66, 3, B=2, H=1, bias="slots"), F32)
    first, second = (compute(inputs, "triton")["dbias"] for _ in range(2))
    assert torch.equal(first, second)
    check_accuracy(inputs, {"dbias": first})
