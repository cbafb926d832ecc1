"""hk.select_blocks through the compiled CPU kernels, against its own float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hierkernels.native import native, native_error
from hierkernels.ops.attention.spec import ALL_DTYPES
from hierkernels.ops.select_blocks.spec import CORRECTNESS, SelectCase
from hierkernels.ops.select_blocks.testing import check_selection, make_inputs
from hierkernels.testing import case_ids, level_ids, poisoned_memory, threads

CORE = native()
if CORE is None:
    pytest.skip(f"the compiled core is missing: {native_error()}", allow_module_level=True)
ISAS: list[str] = CORE.cpu_isas()
CASES = {case.name: case for case in CORRECTNESS}
OTHER_LEVELS = (
    "n65", "n507", "logit-n507", "d3", "g6", "not-shared", "l32-d16-s64", "padded-l12-d4-s4",
    "select17", "logit-select17", "forced-paper", "offset-forced", "not-causal-no-own", "ties",
    "logit-ties", "ties-select6", "ties-select9", "logit-logits-x1000",
)  # fmt: skip


def _check(case: SelectCase, dtype: torch.dtype, n_threads: int = 2) -> None:
    inputs = make_inputs(case, dtype)
    with threads(n_threads), poisoned_memory():
        indices = inputs.run("cpu")
    check_selection(inputs, indices)


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"select_blocks-{ISAS[-1]}-{name}")
        for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
    ],
)
def test_selection(case: SelectCase, dtype: torch.dtype) -> None:
    _check(case, dtype)


_LEVELS = [
    pytest.param(*values, id=name)
    for name, *values in level_ids("select_blocks", ISAS, ALL_DTYPES, lambda dtype: OTHER_LEVELS)
]


@pytest.mark.parametrize("isa, name, dtype", _LEVELS)
def test_selection_on_other_levels(
    isa: str, name: str, dtype: torch.dtype, set_isa: Callable[[str], None]
) -> None:
    set_isa(isa)
    _check(CASES[name], dtype)
