"""hk.native_sparse_attention against the float64 oracle, given the blocks a backend chooses."""

from __future__ import annotations

import pytest
import torch

from hierkernels.native import native
from hierkernels.ops.attention.spec import ALL_DTYPES
from hierkernels.ops.native_sparse_attention.spec import CORRECTNESS, NsaCase
from hierkernels.ops.native_sparse_attention.testing import check_accuracy, compute, make_inputs
from hierkernels.testing import case_ids, poisoned_memory

CASES = {case.name: case for case in CORRECTNESS}
# What the reference's own rounding is judged on: the kernels run every case.
FOR_REFERENCE = ("paper-n65", "seed-n65", "seed-both-ways", "paper-own-selection")


@pytest.mark.skipif(native() is None, reason="the compiled core is missing")
@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"native_sparse_attention-cpu-{name}")
        for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
    ],
)
def test_cpu(case: NsaCase, dtype: torch.dtype) -> None:
    with poisoned_memory():
        check_accuracy(make_inputs(case, dtype), "cpu")


@pytest.mark.parametrize("name", FOR_REFERENCE)
def test_reference(name: str) -> None:
    for dtype in ALL_DTYPES:
        check_accuracy(make_inputs(CASES[name], dtype), "reference")


@pytest.mark.skipif(native() is None, reason="the compiled core is missing")
@pytest.mark.parametrize("name", ["seed-n65", "paper-n65", "seed-own-selection"])
def test_backends_agree_about_everything(name: str) -> None:
    """In float64 they choose the same blocks."""
    inputs = make_inputs(CASES[name], torch.float64)
    expected, got = (compute(inputs, backend) for backend in ("reference", "cpu"))
    assert expected.keys() == got.keys() >= {"out", "dgates", "dk_window", "dq_cmp"}
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-11, msg=key)


def test_gradients_are_bitwise_repeatable() -> None:
    inputs = make_inputs(CASES["seed-n65"], torch.float32)
    first, second = compute(inputs, None), compute(inputs, None)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CORRECTNESS, ids=str)
def test_flops_of_the_stages(case: NsaCase) -> None:
    """Those of the products, counted pair by pair."""
    stages = case.stages(torch.float32)
    heads, channels = case.B * case.Hq, 2.0 * (case.D + case.Dv)
    for name, branch in (("compressed", case.compressed()), ("window", case.window())):
        pairs = int(branch.visible_range.mask(branch.Nq, branch.Nk).sum())
        assert stages[name].flops == heads * channels * pairs
    if case.is_causal:
        # Every query has the blocks before its own that it may select, and its own.
        blocks = case.n + case.definition.own_block
        pairs = sum(
            (min(blocks, p // case.S + 1) - 1) * case.S + p % case.S + 1
            for p in range(case.offset, case.Nk)
        )
        assert stages["selected"].flops == heads * channels * pairs or blocks == 0
    backward = case.stages(torch.float32, "backward")
    assert backward["window"].flops == 2.5 * stages["window"].flops
    assert "select" not in backward
    assert case.flops() == sum(work.flops for work in stages.values())
    assert case.bytes(torch.bfloat16) < case.bytes(torch.float32) or case.Nq == 0
