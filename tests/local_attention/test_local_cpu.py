"""hk.local_attention through the compiled CPU kernels, against its own float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from hierkernels import testing
from hierkernels.native import native, native_error
from hierkernels.ops.attention.spec import ALL_DTYPES, Case, dtype_name
from hierkernels.ops.local_attention.spec import CORRECTNESS, LocalCase
from hierkernels.ops.local_attention.testing import LocalInputs, make_inputs, make_standard
from hierkernels.testing import (
    Results,
    Standard,
    case_ids,
    check_accuracy,
    compute,
    level_ids,
    poisoned_memory,
)

CORE = native()
if CORE is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)
ISAS: list[str] = CORE.cpu_isas()
CASES = {case.name: case for case in CORRECTNESS}
# The bias by slots is the one thing that these kernels do for local attention alone.
OTHER_LEVELS = (
    "exact-n65-w16", "both-n37-w5", "bias", "bias-w1", "bias-long", "bias-exact", "bias-g3",
    "everything",
)  # fmt: skip


@functools.cache
def _standard(name: str, dtype: torch.dtype) -> tuple[LocalInputs, Standard]:
    inputs = make_inputs(CASES[name], dtype)
    return inputs, make_standard(inputs)


def _kernels(inputs: testing.Inputs, threads: int = 2) -> Results:
    """Results of the cpu backend in memory that held NaN before."""
    torch.set_num_threads(threads)
    with poisoned_memory():
        assert torch.empty(1).isnan().all(), "the memory is not poisoned"
        return compute(inputs, "cpu")


_LEVELS = [
    pytest.param(*values, id=name)
    for name, *values in level_ids("local_attention", ISAS, ALL_DTYPES, lambda dtype: OTHER_LEVELS)
]


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(case.name, dtype, id=f"local_attention-{ISAS[-1]}-{name}")
        for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
    ],
)
def test_accuracy(name: str, dtype: torch.dtype) -> None:
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs), standard)


@pytest.mark.parametrize("isa, name, dtype", _LEVELS)
def test_accuracy_on_other_levels(
    isa: str, name: str, dtype: torch.dtype, set_isa: Callable[[str], None]
) -> None:
    set_isa(isa)
    inputs, standard = _standard(name, dtype)
    check_accuracy(inputs, _kernels(inputs), standard)


# Sequences of several segments of the AMX backward, whose keys are stored as soon as no later row
# sees them: grouped rows, a bias, keys that no row sees first or last, rows that see no key.
SEGMENTS = (
    LocalCase("segments", 1, 4, 2, 1500, 1500, 24, 40, is_causal=True, width=100),
    LocalCase("segments-bias", 2, 1, 1, 2100, 2100, 16, 16, width=70, bias="slots"),
    Case("segments-more-keys", 1, 2, 2, 1300, 2700, 16, 16, window=(60, 0)),
    Case("segments-more-queries", 1, 2, 1, 2700, 1300, 16, 16, window=(60, 5)),
    Case("segments-wide", 1, 1, 1, 2300, 2300, 16, 16, window=(1500, 0)),
)


@pytest.mark.parametrize("case", SEGMENTS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_windows_over_long_sequences(dtype: torch.dtype, case: Case) -> None:
    inputs = (
        make_inputs(case, dtype)
        if isinstance(case, LocalCase)
        else testing.make_inputs(case, dtype)
    )
    standard = testing.make_standard(inputs)
    for threads in (1, 2, 3):  # with three, heads are split where there are fewer
        check_accuracy(inputs, _kernels(inputs, threads), standard)
