"""The compiled kernels of selected attention against the float64 reference, on each instruction
set there is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from hierkernels.native import native, native_error
from hierkernels.ops.selected_attention.spec import ALL_DTYPES, CORRECTNESS
from hierkernels.ops.selected_attention.testing import (
    Inputs,
    check_accuracy,
    make_inputs,
    make_standard,
)
from hierkernels.testing import (
    Results,
    Standard,
    case_ids,
    compute,
    level_ids,
    poisoned_memory,
    threads,
)

CORE = native()
if CORE is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)
# Those with a kernel of their own: avx512bf16 for bfloat16, which amx takes over.
LEVELS = ("generic", "avx2", "avx512", "avx512bf16")
ISAS: list[str] = [isa for isa in CORE.cpu_isas() if isa in LEVELS]
CASES = {case.name: case for case in CORRECTNESS}

# All cases run on the best instruction set. The others are the same source at another vector width,
# so there a case of each kind is enough: tails of vectors, cut blocks, packing, each option.
OTHER_LEVELS = (
    "n0", "n1", "n17", "n65", "q7-k200", "q33-k5", "q9-k0", "g1", "g3", "g20", "g128",
    "g3-per-head-own", "b1", "b3", "b20", "b300", "b5-g16-any", "named-0-own", "named-40-any",
    "any", "holes", "future", "same-own-g4", "none", "any-full", "weights-twice",
    "weights-per-head", "d1", "d40", "d40-dv24", "lse-grad", "scale-negative", "logits-x100",
    "layout-packed", "layout-unaligned", "everything",
)  # fmt: skip
CONVERSIONS = (
    "n17", "q7-k200", "g3", "b3", "b20", "any", "weights-twice", "d40", "d40-dv24", "lse-grad",
    "layout-unaligned", "everything",
)  # fmt: skip


@functools.cache
def _standard(name: str, dtype: torch.dtype) -> tuple[Inputs, Standard]:
    inputs = make_inputs(CASES[name], dtype)
    return inputs, make_standard(inputs)


def _kernels(inputs: Inputs) -> Results:
    """Results of the cpu backend in memory that held NaN before."""
    with threads(), poisoned_memory():
        assert torch.empty(1).isnan().all(), "the memory is not poisoned"
        return compute(inputs, "cpu")


def _names(dtype: torch.dtype) -> tuple[str, ...]:
    """Below the best level products know float32 and float64 alone; others pass conversions."""
    return OTHER_LEVELS if dtype == torch.float32 else CONVERSIONS


_BEST = [
    pytest.param(case.name, dtype, id=f"selected_attention-{ISAS[-1]}-{name}")
    for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
]
_LEVELS = [
    pytest.param(*values, id=name)
    for name, *values in level_ids("selected_attention", ISAS, ALL_DTYPES, _names)
]


@pytest.mark.parametrize("name, dtype", _BEST)
def test_accuracy(name: str, dtype: torch.dtype, set_isa: Callable[[str], None]) -> None:
    set_isa(ISAS[-1])
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs), standard)


@pytest.mark.parametrize("isa, name, dtype", _LEVELS)
def test_accuracy_on_other_levels(
    isa: str, name: str, dtype: torch.dtype, set_isa: Callable[[str], None]
) -> None:
    set_isa(isa)
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs), standard)


@pytest.mark.parametrize(
    "isa, dtype, lower",
    [
        ("avx512bf16", torch.float32, "avx512"),
        ("amx", torch.float32, "avx512"),
        ("amx", torch.bfloat16, "avx512bf16"),
    ],
    ids=str,
)
def test_higher_levels_take_the_kernel_of_lower_ones(
    isa: str, dtype: torch.dtype, lower: str, set_isa: Callable[[str], None]
) -> None:
    if isa not in CORE.cpu_isas():
        pytest.skip(f"this machine has no {isa}")
    inputs = make_inputs(CASES["everything"], dtype)
    set_isa(lower)
    expected = compute(inputs, "cpu")
    set_isa(isa)
    for name, value in compute(inputs, "cpu").items():
        assert torch.equal(value, expected[name]), name
