"""make cuda-report: what ptxas says is read, and a spill in a main kernel fails."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

PATH = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "report.py"

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN1a24attention_forward_kernelIfLi64EEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN1a24attention_forward_kernelIfLi64EEEvi
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes stack, 1000 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN1a25attention_forward_kernel2IfEEvi' for 'sm_90'
ptxas info    : Function properties for _ZN1a25attention_forward_kernel2IfEEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 1000 bytes cmem[0]
"""


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="names are read by c++filt")
def test_the_log_is_read(report: ModuleType) -> None:
    first, second = report.read_log(LOG)
    assert (first.kernel, first.arch) == ("a::attention_forward_kernel<float, 64>", "sm_80")
    assert (first.registers, first.spilled) == (255, 12)
    assert (second.arch, second.registers, second.spilled) == ("sm_90", 31, 0)


def test_what_is_a_problem(report: ModuleType) -> None:
    blocks = {"main<float, 64>": (128, 4096), "rare<float, 256>": (64, 4096)}
    blocks["large<float>"] = (128, 100 * 1024)

    def found(kernel: str, spilled: int) -> str:
        return report.problem(report.Usage(kernel, "sm_80", 255, spilled), blocks)

    assert found("main<float, 64>", 0) == ""
    assert found("main<float, 64>", 4) == "spills"
    assert found("rare<float, 256>", 4) == ""
    assert "shared memory" in found("large<float>", 0)
    assert found("unknown<float>", 0) == "not in cuda_kernel_table"


def test_without_cuda_it_says_so(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "native", lambda: SimpleNamespace(cuda_version=None))
    assert report.main() == 0
    assert "skipped, the core was built without CUDA" in capsys.readouterr().out
