"""The attention kernels compiled ahead of time for GPUs that need not be there.

The quick set is compiled once, in processes of its own: see compiled.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from compiled import ARCH, Reports, select

from hierkernels.ops.attention import triton_configs as configs
from hierkernels.ops.attention.aot import ARCHITECTURES, CASES


def _parameters(quick: bool) -> list:
    return [
        pytest.param(
            arch, case, id=f"attention-triton-{case.dtype}-sm_{arch}-{case.name}-d{case.channels}"
        )
        for arch in ARCHITECTURES
        for case in CASES
        if (case.quick and arch == ARCH) == quick
    ]


def _check(reports: list[dict]) -> None:
    kernels = {report["kernel"] for report in reports}
    short = reports[0]["case"].startswith("short")  # one backward kernel writes all
    assert kernels >= {"forward", "backward_dq"} | ({"backward_dkv"} if not short else set())
    problems = [f"{r['kernel']} {r['tile']}: {r['problem']}" for r in reports if r["problem"]]
    assert not problems


@pytest.mark.parametrize(("arch", "case"), _parameters(quick=True))
def test_compiles(arch: int, case, quick: Reports) -> None:
    """No spills, shared memory within the limit, tensor cores used and not serialised."""
    _check(select(quick, "attention", arch, case.name, case.channels))


def test_a_bias_is_loaded_in_vectors(quick: Reports) -> None:
    """An even number of keys is known to the compiler where a bias or mask has rows of them."""
    reports = select(quick, "attention", ARCH, "bias", 64)
    assert len(reports) == 3
    assert [r["narrow"] for r in reports] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), _parameters(quick=False))
def test_compiles_everything(arch: int, case, full: Reports) -> None:
    _check(select(full, "attention", arch, case.name, case.channels))


def test_device_families() -> None:
    """Unknown devices take a row that fits their shared memory."""
    families = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90"}
    families |= {(10, 0): "sm_100", (12, 0): "sm_86"}
    for capability, family in families.items():
        assert configs.device_family(capability) == family
