"""Few queries against many keys, with fewer heads than threads: the CPU kernels share the keys."""

from __future__ import annotations

import pytest
import torch

from hierkernels.native import native, native_error
from hierkernels.ops.attention.spec import Case
from hierkernels.testing import (
    check_accuracy,
    compute,
    make_inputs,
    make_standard,
    poisoned_memory,
    threads,
)

if native() is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)

THREADS = 3  # does not divide the lengths


def _case(name: str, H: int = 1, Hkv: int = 1, Nq: int = 1, Nk: int = 2500, **options) -> Case:
    return Case(name, options.pop("B", 1), H, Hkv, Nq, Nk, 64, options.pop("Dv", 64), **options)


CASES = (
    _case("one", is_causal=True),
    _case("group", H=8, is_causal=True),
    _case("two-tasks", H=4, Hkv=2, Nq=3, is_causal=True),
    _case("two-batches", B=2, Nq=2, Dv=40, padding="right"),
    _case("queries", Nq=70, Nk=2311, is_causal=True, lse_grad=True),
    _case("window", Nq=5, window=(1900, 0)),
    # A part of the keys, or more than one, is hidden from some row: its maximum is -inf.
    _case("narrow-window", Nq=4, window=(100, None)),
    _case("no-key", Nq=3, mask="q", mask_pattern="rows"),
    _case("leading-mask", mask="k", mask_pattern="leading"),
    _case("bias-dropout", H=2, Nq=2, bias="hqk", dropout_p=0.2),
    _case("logits-x100", Nq=2, is_causal=True, gain=100.0),
    _case("logits-x100-rows", Nq=40, is_causal=True, gain=100.0),
)


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float64), ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy_and_repeatability(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with threads(THREADS), poisoned_memory():
        results = compute(inputs, "cpu")
        again = compute(inputs, "cpu", gradients=False)
    check_accuracy(inputs, results, make_standard(inputs))
    for name, result in again.items():
        assert torch.equal(result, results[name]), f"{name} changes from run to run"
