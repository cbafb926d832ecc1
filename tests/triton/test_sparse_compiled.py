"""The kernels of the sparse operators and of rows of channels, compiled without a GPU.

Each quick set is compiled once, in processes of its own: see compiled.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from compiled import ARCH, Reports, select

from hierkernels.ops.gelu import aot as gelu
from hierkernels.ops.native_sparse_attention import aot as native_sparse_attention
from hierkernels.ops.rms_norm import aot as rms_norm
from hierkernels.ops.rotary import aot as rotary
from hierkernels.ops.select_blocks import aot as select_blocks
from hierkernels.ops.selected_attention import aot as selected_attention
from hierkernels.triton_common.aot import ARCHITECTURES

OPS = {
    "native_sparse_attention": native_sparse_attention,
    "gelu": gelu,
    "rms_norm": rms_norm,
    "rotary": rotary,
    "select_blocks": select_blocks,
    "selected_attention": selected_attention,
}


def _parameters(quick: bool) -> Iterator:
    for op, module in OPS.items():
        for arch in ARCHITECTURES:
            for case in module.CASES:
                if (case.quick and arch == ARCH) == quick:
                    name = f"{op}-triton-{case.dtype}-sm_{arch}-{case.name}-d{case.channels}"
                    yield pytest.param((op, arch, case.name, case.channels), id=name)


def _check(op: str, reports: list[dict]) -> None:
    kernels = {report["kernel"] for report in reports}
    if op == "selected_attention":
        assert kernels >= {"lists", "forward", "backward_dq", "backward_dkv"}
    elif op == "native_sparse_attention":
        assert kernels == {"sum_forward", "sum_backward"}
    elif op in ("gelu", "rms_norm"):
        assert kernels == {"forward", "backward"}
    else:
        assert len(kernels) == 1
    assert not [f"{r['kernel']} {r['tile']}: {r['problem']}" for r in reports if r["problem"]]


@pytest.mark.parametrize("case", list(_parameters(quick=True)))
def test_compiles(case: tuple, quick: Reports) -> None:
    """No spills, shared memory within the limit, tensor cores used and not serialised."""
    _check(case[0], select(quick, *case))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(_parameters(quick=False)))
def test_compiles_everything(case: tuple, full: Reports) -> None:
    _check(case[0], select(full, *case))
