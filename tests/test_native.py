"""The compiled core: it loads, names its instruction sets, and shares PyTorch's threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hierkernels as hk
from hierkernels.core_stamp import is_stale, misfit, stamp
from hierkernels.native import CPU_ISAS, native, native_error

ROOT = Path(__file__).resolve().parents[1]
CORE = native()
needs_core = pytest.mark.skipif(
    CORE is None, reason=f"the compiled core is missing: {native_error()}"
)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _load(built_from: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where the core says that it was built from something else."""
    before = f"""
import hierkernels._native as core
core.built_from = {built_from}
from hierkernels import core_stamp, version
from hierkernels.native import native, native_error
import torch, hierkernels as hk
q = torch.zeros(1, 1, 1, 4)
"""
    return _python("import torch\n" + before + code)


@needs_core
def test_the_core_says_what_it_was_built_from() -> None:
    assert CORE.built_from == stamp(hk.__version__, ROOT / "csrc")


@needs_core
@pytest.mark.parametrize(
    "built_from, reason",
    [
        ("None", "the compiled core is of version unknown, not "),
        ("'0.0.1 ' + core.built_from.split(' ', 1)[1]", "is of version 0.0.1, not "),
        ("core.built_from.split()[0] + ' 0123 0123'", "of other sources, whose functions differ"),
    ],
    ids=["no stamp", "version", "functions"],
)
def test_a_core_that_does_not_fit_is_not_called(built_from: str, reason: str) -> None:
    found = _load(built_from, "hk.attention(q, q, q); hk.attention(q, q, q, backend='cpu')")
    assert found.returncode != 0
    assert "NotImplementedError: attention: backend 'cpu' does not support" in found.stderr
    for text in ("RuntimeWarning: hierkernels: ", reason, "python setup.py build_ext --inplace"):
        assert text in found.stderr


@needs_core
def test_a_core_that_is_older_than_its_sources_is_told_of() -> None:
    found = _load("' '.join(core.built_from.split()[:2]) + ' 0123'", "native(); native()")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("RuntimeWarning: hierkernels: the compiled core is older than") == 1


def test_stamps_tell_sources_apart(tmp_path: Path) -> None:
    for name in ("bindings.cpp", "cpu/kernel.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("first\n")
    first = stamp("1", tmp_path)
    assert not misfit(first, "1", tmp_path) and not is_stale(first, "1", tmp_path)
    (tmp_path / "cpu/kernel.cpp").write_text("second\n")
    assert not misfit(first, "1", tmp_path) and is_stale(first, "1", tmp_path)
    (tmp_path / "bindings.cpp").write_text("second\n")
    assert misfit(first, "1", tmp_path)
    # An installed package has no sources.
    assert not misfit(first, "1", tmp_path / "none") and not is_stale(first, "1", tmp_path / "none")
    assert misfit(first, "2", tmp_path / "none")


@needs_core
@pytest.mark.parametrize(
    "tensor, error, words",
    [
        (3, TypeError, "a torch.Tensor expected"),
        (torch.zeros(2, 4, dtype=torch.int16), TypeError, "no tensors of 16 bits"),
        (torch.zeros(1, 1, 1, 1, 4), ValueError, "at most 4 dimensions"),
        (torch.zeros(2, 4).to_sparse(), RuntimeError, "data pointer"),
    ],
    ids=["number", "int16", "dimensions", "sparse"],
)
def test_what_the_core_cannot_read_is_refused(
    tensor: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        CORE.gelu_forward(tensor, 0, torch.zeros(2, 4), None)


@needs_core
def test_tensors_are_read_as_they_lie() -> None:
    """Parts of tensors, by offset and stride, and parameters; dtypes that kernels compute in."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, out = torch.randn(3, 8).to(dtype), torch.zeros(5, 8, dtype=dtype)
        CORE.gelu_forward(torch.nn.Parameter(x)[1:], 0, out[2:4], None)
        torch.testing.assert_close(out[2:4], torch.nn.functional.gelu(x[1:]))
        assert (out[:2] == 0).all() and (out[4:] == 0).all()


@needs_core
def test_instruction_sets_are_named_and_nested() -> None:
    isas = CORE.cpu_isas()
    assert tuple(isas) == CPU_ISAS[: len(isas)] and isas
    assert CORE.cpu_isa() in isas


@needs_core
def test_instruction_set_can_be_lowered_and_restored(set_isa: Callable[[str], None]) -> None:
    for isa in CORE.cpu_isas():
        set_isa(isa)
        assert CORE.cpu_isa() == isa


@needs_core
@pytest.mark.parametrize("name", ["", "sse", "AVX2", "avx1024"])
def test_unknown_instruction_set_is_refused(name: str, set_isa: Callable[[str], None]) -> None:
    before = CORE.cpu_isa()
    with pytest.raises(ValueError, match=f"no instruction set '{name}'"):
        set_isa(name)
    assert CORE.cpu_isa() == before


@needs_core
def test_environment_caps_the_instruction_set() -> None:
    code = "from hierkernels.native import native; print(native().cpu_isa())"
    for isa in CPU_ISAS:
        found = _python(code, HIERKERNELS_CPU_ISA=isa)
        assert found.returncode == 0, found.stderr
        capped = isa if isa in CORE.cpu_isas() else CORE.cpu_isas()[-1]
        assert found.stdout.strip() == capped


def test_environment_with_an_unknown_instruction_set_is_an_error() -> None:
    code = "import torch, hierkernels as hk; q = torch.zeros(1, 1, 1, 4); hk.attention(q, q, q)"
    found = _python(code, HIERKERNELS_CPU_ISA="avx1024")
    assert found.returncode != 0
    assert (
        "HIERKERNELS_CPU_ISA must be one of generic, avx2, avx512, avx512bf16, amx, got 'avx1024'"
        in (found.stderr)
    )


@needs_core
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process() -> None:
    # Two runtimes would mean two thread pools, which fight over the cores.
    code = (
        "import hierkernels as hk, torch; q = torch.zeros(64, 1, 9, 16);"
        "hk.attention(q, q, q, backend='cpu');"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line},"
        " sep='\\n')"
    )
    found = _python(code)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split()) == 1, found.stdout


@needs_core
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc/self/task")
@pytest.mark.parametrize("n", [1, 3])
def test_set_num_threads_is_respected(n: int) -> None:
    # empty() starts no thread of PyTorch's, so the new threads are the kernel's.
    code = f"""
import os, torch
torch.set_num_threads({n})
import hierkernels as hk
from hierkernels.native import native
native()
q = torch.empty(256, 4, 9, 64)
before = len(os.listdir("/proc/self/task"))
hk.attention(q, q, q, backend="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""
    found = _python(code)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) == n - 1


@needs_core
def test_the_thread_count_does_not_change_the_result() -> None:
    # A sequence's sums are made by one thread, or in an order that does not depend on the count.
    q, k, v = (torch.randn(3, 2, 300, 32, requires_grad=True) for _ in range(3))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            out = hk.attention(q, k, v, is_causal=True, backend="cpu")
            results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b)


@needs_core
def test_the_interpreter_runs_on_while_the_kernel_does() -> None:
    # The lock is released: a thread of Python makes progress during one long call.
    code = """
import threading, time, torch, hierkernels as hk
torch.set_num_threads(1)
q = torch.zeros(1, 8, 4096, 64)
hk.attention(q[:, :, :8], q[:, :, :8], q[:, :, :8], backend="cpu")
ticks, done = [], threading.Event()
def tick():
    while not done.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
thread = threading.Thread(target=tick)
thread.start()
start = time.perf_counter()
hk.attention(q, q, q, backend="cpu")
end = time.perf_counter()
done.set()
thread.join()
inside = [t for t in ticks if start < t < end]
print(len(inside), end - start)
"""
    found = _python(code)
    assert found.returncode == 0, found.stderr
    inside, seconds = found.stdout.split()
    assert int(inside) >= 3, f"{inside} ticks in {seconds} s"
