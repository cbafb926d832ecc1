"""The causal_sgu kernels compiled ahead of time for GPUs that need not be there.

The quick set is compiled once, in processes of its own: see compiled.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from compiled import ARCH, Reports, select

from hierkernels.ops.causal_sgu.aot import CASES, Case
from hierkernels.triton_common.aot import ARCHITECTURES

KERNELS = {"forward", "backward_mix", "backward_gate", "backward_weight"}


def _parameters(quick: bool) -> list:
    return [
        pytest.param(arch, case, id=f"causal_sgu-triton-{case.dtype}-sm_{arch}-{case.name}")
        for arch in ARCHITECTURES
        for case in CASES
        if (case.quick and arch == ARCH) == quick
    ]


def _check(reports: list[dict]) -> None:
    assert {report["kernel"] for report in reports} == KERNELS
    assert not [f"{r['kernel']} {r['tile']}: {r['problem']}" for r in reports if r["problem"]]


@pytest.mark.parametrize(("arch", "case"), _parameters(quick=True))
def test_compiles(arch: int, case: Case, quick: Reports) -> None:
    """No spills, shared memory within the limit, tensor cores used and not serialised."""
    _check(select(quick, "causal_sgu", arch, case.name, case.channels))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), _parameters(quick=False))
def test_compiles_everything(arch: int, case: Case, full: Reports) -> None:
    _check(select(full, "causal_sgu", arch, case.name, case.channels))
