"""What each CUDA kernel takes: registers, shared memory, spills, for each architecture.

    python csrc/cuda/report.py      (make cuda-report)

Reads what ptxas said during the build. Exit status 1 if a main kernel spills registers, or if a
block takes more shared memory than every device has.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hierkernels.native import native

ROOT = Path(__file__).resolve().parents[2]
MAX_SHARED = 99 * 1024  # of a block, on every device from sm_80 on
# float32 at more than 128 channels may spill some bytes: it is there to be right, and rare.
MAY_SPILL = re.compile(r"<float, 256>")


@dataclass
class Usage:
    """One kernel, compiled for one architecture."""

    kernel: str
    arch: str
    registers: int
    spilled: int  # bytes stored


def read_log(text: str) -> Iterator[Usage]:
    """The kernels of one file's compilation."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    for mangled, arch, spilled, registers in entry.findall(text):
        yield Usage(demangle(mangled), arch, int(registers), int(spilled))


def demangle(mangled: str) -> str:
    """attention_forward_kernel<float, 64> for its mangled name."""
    found = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = found.stdout.strip().removeprefix("void ")
    name = re.sub(r"hierkernels::cuda::|\(anonymous namespace\)::", "", name)
    return re.sub(r"\(.*", "", name)


def problem(usage: Usage, blocks: dict[str, tuple[int, int]]) -> str:
    """What is wrong with a kernel, "" if nothing; blocks: threads and shared memory by name."""
    if usage.kernel not in blocks:
        return "not in cuda_kernel_table"
    if blocks[usage.kernel][1] > MAX_SHARED:
        return f"more than {MAX_SHARED} bytes of shared memory"
    return "spills" if usage.spilled and not MAY_SPILL.search(usage.kernel) else ""


def main() -> int:
    """Prints the table; returns the exit status."""
    core = native()
    if core is None or core.cuda_version is None:
        print("cuda-report: skipped, the core was built without CUDA (nvcc was not found)")
        return 0
    blocks = {name: (threads, shared) for name, threads, shared in core.cuda_kernel_table()}
    logs = sorted(ROOT.glob("build/temp*/**/*.ptxas"))
    usages = [usage for log in logs for usage in read_log(log.read_text())]
    problems = 0
    for u in sorted(usages, key=lambda u: (u.kernel, u.arch)):
        threads, shared = blocks.get(u.kernel, (0, 0))
        found = problem(u, blocks)
        problems += bool(found)
        print(
            f"{u.arch:7s}{u.kernel:52s}{threads:5d} threads{u.registers:5d} registers"
            f"{u.spilled:5d} B spilled{shared / 1024:7.1f} KiB  {found or 'ok'}"
        )
    missing = sorted(set(blocks) - {u.kernel for u in usages})
    for name in missing:
        print(f"{name}: no compilation of it was logged")
    kernels = len({u.kernel for u in usages})
    print(f"{kernels} kernels, {len(usages)} compilations, {problems + len(missing)} problems")
    return 1 if problems or missing or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
