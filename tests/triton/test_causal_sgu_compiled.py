"""The causal_sgu kernels compiled ahead of time for GPUs that need not be there.

The whole of the quick set is compiled once, in processes of its own (this one may interpret).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.causal_sgu.aot import CASES, Case
from hierkernels.triton_common.aot import ARCHITECTURES

Reports = dict[tuple[int, str], list[dict]]  # by architecture and case
KERNELS = {"forward", "backward_mix", "backward_gate", "backward_weight"}


def _compile(folder: Path, *options: str) -> Reports:
    path = folder / "reports.json"
    module = "hierkernels.ops.causal_sgu.aot"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, "--json", str(path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stdout + done.stderr
    reports: Reports = defaultdict(list)
    for report in json.loads(path.read_text()):
        reports[report["arch"], report["case"]].append(report)
    return reports


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return _compile(tmp_path_factory.mktemp("aot"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return _compile(tmp_path_factory.mktemp("aot"), "--full")


def _parameters(quick: bool) -> list:
    return [
        pytest.param(arch, case, id=f"causal_sgu-triton-{case.dtype}-sm_{arch}-{case.name}")
        for arch in ARCHITECTURES
        for case in CASES
        if case.quick == quick
    ]


def _check(reports: list[dict]) -> None:
    assert {report["kernel"] for report in reports} == KERNELS
    assert not [f"{r['kernel']} {r['tile']}: {r['problem']}" for r in reports if r["problem"]]


@pytest.mark.parametrize(("arch", "case"), _parameters(quick=True))
def test_compiles(arch: int, case: Case, quick: Reports) -> None:
    """No spills, shared memory within the limit, tensor cores used and not serialised."""
    _check(quick[arch, case.name])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "case"), _parameters(quick=False))
def test_compiles_everything(arch: int, case: Case, full: Reports) -> None:
    _check(full[arch, case.name])
