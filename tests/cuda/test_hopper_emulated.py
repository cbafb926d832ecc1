"""Attention's sm_90a kernels (TMA, wgmma) on the emulation, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hopper_cases import NOT_SERVED, SERVED

from hierkernels.ops.attention.spec import Case, dtype_name
from hierkernels.testing import check_accuracy, compute, make_inputs, poisoned_memory

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def hopper(emulated_cuda: ModuleType) -> Iterator[ModuleType]:
    """The emulated device is an sm_90."""
    emulated_cuda.set_options(seed=1, hopper=True)
    yield emulated_cuda
    emulated_cuda.set_options(seed=1)


OTHER_TYPE = ("h-causal-n193", "h-causal-n520-d128", "h-g8-d128")


def _ids(cases: tuple[Case, ...], dtype: torch.dtype) -> list:
    return [
        pytest.param(c, dtype, id=f"attention-sm90a-{dtype_name(dtype)}-{c.name}") for c in cases
    ]


@pytest.mark.parametrize(
    ("case", "dtype"),
    _ids(SERVED, BF16) + _ids(tuple(c for c in SERVED if c.name in OTHER_TYPE), F16),
)
def test_accuracy(hopper: ModuleType, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    hopper.take_counts()
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)
    counts = hopper.take_counts()
    assert counts["tensor_copies"] > 0
    assert counts["wgmma"] > 0 or not case.visible
    assert counts["mma"] == 0  # nor did the backward take a kernel of sm_80


@pytest.mark.parametrize(("case", "dtype"), _ids(NOT_SERVED, BF16) + _ids(SERVED[:1], F32))
def test_all_else_goes_to_the_kernels_of_sm_80(
    hopper: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    call = make_inputs(case, dtype).call()
    hopper.take_counts()
    out, lse = call.new_outputs()
    hopper.cuda_attention_forward(*call.arguments(), out, lse, None, 0)
    counts = hopper.take_counts()
    assert counts["wgmma"] == counts["tensor_copies"] == 0
    assert counts["mma"] > 0


def test_other_devices_keep_the_kernels_of_sm_80(emulated_cuda: ModuleType) -> None:
    emulated_cuda.take_counts()
    compute(make_inputs(SERVED[0], BF16), "cuda")
    assert emulated_cuda.take_counts()["wgmma"] == 0


@pytest.mark.parametrize("name", ["h-causal-n700", "h-g8-d128"])
def test_results_do_not_depend_on_the_schedule(hopper: ModuleType, name: str) -> None:
    """Bitwise, under many orders of threads and arrivals of copies; and no race is seen."""
    (case,) = (c for c in SERVED if c.name == name)
    inputs = make_inputs(case, BF16)
    first = compute(inputs, "cuda")
    for seed in range(2, 6):
        hopper.set_options(seed=seed, hopper=True)
        for result, expected in zip(compute(inputs, "cuda").values(), first.values(), strict=True):
            assert torch.equal(result, expected)
