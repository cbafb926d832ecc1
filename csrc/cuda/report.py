"""What each CUDA kernel takes: registers, shared memory, spills, for each architecture.

    python csrc/cuda/report.py      (make cuda-report)

Reads what ptxas said during the build. Exit status 1 if a kernel spills registers, if a block
takes more shared memory than its devices have, or if ptxas serialised the products (wgmma) of a
kernel for sm_90a. Where cuobjdump and nvdisasm are at hand, such kernels must have HGMMA, too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hierkernels.native import native

ROOT = Path(__file__).resolve().parents[2]
MAX_SHARED = 99 * 1024  # of a block, on every device from sm_80 on
MAX_SHARED_90A = 227 * 1024


@dataclass
class Usage:
    """One kernel, compiled for one architecture."""

    kernel: str
    arch: str
    registers: int
    spilled: int  # bytes stored
    serialised: bool = False  # each wgmma waits for the one before


def read_log(text: str) -> Iterator[Usage]:
    """The kernels of one file's compilation."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    serialised = set(
        re.findall(r"wgmma\S* instructions are serialized.*(?:in|for) the function '(\w+)'", text)
    )
    for mangled, arch, spilled, registers in entry.findall(text):
        yield Usage(demangle(mangled), arch, int(registers), int(spilled), mangled in serialised)


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
    limit = MAX_SHARED_90A if usage.arch == "sm_90a" else MAX_SHARED
    if blocks[usage.kernel][1] > limit:
        return f"more than {limit} bytes of shared memory"
    if usage.serialised:
        return "wgmma is serialised"
    return "spills" if usage.spilled else ""


def disassembler() -> tuple[str, dict[str, str]] | None:
    """cuobjdump and the environment in which it finds nvdisasm: of the toolkit or of Triton."""
    folders = os.environ["PATH"].split(os.pathsep)
    if triton := importlib.util.find_spec("triton"):
        for place in triton.submodule_search_locations or ():
            folders.append(str(Path(place) / "backends" / "nvidia" / "bin"))
    path = os.pathsep.join(folders)
    found = shutil.which("cuobjdump", path=path)
    if found is None or shutil.which("nvdisasm", path=path) is None:
        return None
    return found, {**os.environ, "PATH": path}


def count_instructions(disassembly: str, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """For each kernel of a disassembly, how often the instructions occur."""
    counts = {}
    for part in disassembly.split("Function : ")[1:]:
        mangled, _, body = part.partition("\n")
        found = {name: len(re.findall(rf"\b{name}\b", body)) for name in names}
        counts[demangle(mangled.strip())] = found
    return counts


def report_hopper() -> int:
    """Prints what kernels for sm_90a consist of; returns how many lack HGMMA."""
    tool = disassembler()
    if tool is None:
        print("no cuobjdump and nvdisasm here: sm_90a is not disassembled")
        return 0
    lacking = 0
    for obj in sorted(ROOT.glob("build/temp*/cuda/hopper/*.o")):
        command = [tool[0], "-sass", str(obj)]
        shown = subprocess.run(command, capture_output=True, text=True, env=tool[1], check=True)
        names = ("HGMMA", "UTMALDG", "LDL", "STL")
        for kernel, found in sorted(count_instructions(shown.stdout, names).items()):
            lacking += found["HGMMA"] == 0
            listed = "".join(f"{count:6d} {name}" for name, count in found.items())
            print(f"sm_90a {kernel:52s}{listed}  {'ok' if found['HGMMA'] else 'no HGMMA'}")
    return lacking


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
    lacking = report_hopper()
    kernels = len({u.kernel for u in usages})
    problems += len(missing) + lacking
    print(f"{kernels} kernels, {len(usages)} compilations, {problems} problems")
    return 1 if problems or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
