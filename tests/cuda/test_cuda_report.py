"""make cuda-report: what ptxas says is read, and a spill fails."""

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


# ptxas of a kernel whose products wait for each other, and cuobjdump of two kernels.
SERIALISED = """
ptxas info    : (C7520) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to program dependence in the function '_ZN1a24attention_forward_kernelIfLi64EEEvi'
"""
# ... for want of registers, which may come without a spill.
OUT_OF_REGISTERS = """
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the function \
'_ZN1a24attention_forward_kernelIfLi64EEEvi'
"""
SASS = """
\t\tFunction : _ZN1a24attention_forward_kernelIfLi64EEEvi
\t.headerflags\t@"EF_CUDA_SM90"
        /*0010*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0020*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/  UTMALDG.4D [UR8], [UR4] ;
\t\tFunction : _ZN1a25attention_forward_kernel2IfEEvi
        /*0010*/  HMMA.16816.F32.BF16 R4, R4, R2, R4 ;
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


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="names are read by c++filt")
@pytest.mark.parametrize("warning", [SERIALISED, OUT_OF_REGISTERS], ids=["C7520", "C7512"])
def test_serialised_products_are_a_problem(report: ModuleType, warning: str) -> None:
    first, second = report.read_log(warning + LOG.replace("12 bytes spill", "0 bytes spill"))
    assert (first.serialised, second.serialised) == (True, False)
    blocks = {first.kernel: (128, 4096), second.kernel: (128, 4096)}
    assert report.problem(first, blocks) == "wgmma is serialised"
    assert report.problem(second, blocks) == ""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="names are read by c++filt")
def test_instructions_are_counted(report: ModuleType) -> None:
    assert report.count_instructions(SASS, ("HGMMA", "UTMALDG")) == {
        "a::attention_forward_kernel<float, 64>": {"HGMMA": 2, "UTMALDG": 1},
        "a::attention_forward_kernel2<float>": {"HGMMA": 0, "UTMALDG": 0},
    }


def test_what_is_a_problem(report: ModuleType) -> None:
    blocks = {"main<float, 64>": (128, 4096)}
    blocks["large<float>"] = (128, 100 * 1024)

    def found(kernel: str, spilled: int) -> str:
        return report.problem(report.Usage(kernel, "sm_80", 255, spilled), blocks)

    assert found("main<float, 64>", 0) == ""
    assert found("main<float, 64>", 4) == "spills"
    assert "shared memory" in found("large<float>", 0)
    assert report.problem(report.Usage("large<float>", "sm_90a", 255, 0), blocks) == ""
    assert found("unknown<float>", 0) == "not in cuda_kernel_table"


def test_without_cuda_it_says_so(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "native", lambda: SimpleNamespace(cuda_version=None))
    assert report.main() == 0
    assert "skipped, the core was built without CUDA" in capsys.readouterr().out


def test_the_kernel_table(emulated_core: ModuleType) -> None:
    """Fewer than 40 kernels, with names of their own; each fits the devices that it is for."""
    table = {name: (threads, shared) for name, threads, shared in emulated_core.cuda_kernel_table()}
    assert len(table) == len(emulated_core.cuda_kernel_table()) < 40
    for name, (threads, shared) in table.items():
        assert threads % 32 == 0 and shared <= (227 if name.startswith("hopper") else 99) * 1024, (
            name
        )
    # Those of sm_90a have their shapes in files of their own.
    assert table["hopper_attention_forward_kernel<64>"][0] == 512
    assert table["hopper_attention_key_gradient_kernel<64>"][0] == 384
