"""Builds hierkernels._native: C++ and CUDA compiled by ninja, bound by pybind11, without torch.

Environment: HIERKERNELS_BUILD_CPU and HIERKERNELS_BUILD_CUDA = auto | 0 | 1 (1: fail if
impossible), CXX, NVCC, TORCH_CUDA_ARCH_LIST (such as "8.0;9.0a"), MAX_JOBS.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# A file named *_<level>.cpp is compiled for that instruction set; all others for the baseline.
LEVEL_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
LEVEL_FLAGS["avx512"] += ["-mprefer-vector-width=512"]
LEVEL_FLAGS["avx512bf16"] = LEVEL_FLAGS["amx"] = [*LEVEL_FLAGS["avx512"], "-mavx512bf16"]
# No -ffast-math: linking with it sets flush-to-zero for the whole process.
CXX_FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-ignored-attributes",
    "-Wno-psabi",
]  # fmt: skip
# No --use_fast_math: its tanh has 11 bits. Where less than full accuracy will do, kernels say so.
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# Later devices compile the PTX of 8.0 when they first run a kernel.
DEFAULT_ARCHS = "8.0+PTX;9.0"
# What the kernels outside csrc/cuda/hopper are written for. Compiled for it once, their PTX gives
# the same machine code for a later device as compiling them for it: compared, for sm_90.
VIRTUAL_ARCH = 80
# csrc/cuda/hopper holds instructions that no other architecture has.
HOPPER_FLAGS = ["-gencode", "arch=compute_90a,code=sm_90a"]


def wanted(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def find_tool(setting: str, variables: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    """The tool's path; None if switched off or, with auto, not found."""
    choice = wanted(setting)
    if choice == "0":
        return None
    candidates = [os.environ[v] for v in variables if os.environ.get(v)] + list(names)
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return found
    if choice == "1":
        raise SystemExit(f"{setting}=1, but none of {', '.join(candidates)} was found")
    return None


def cuda_architectures() -> list[str]:
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    flags = []
    for name in names.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        later = number.isdigit() and int(number) > VIRTUAL_ARCH
        flags += ["-gencode", f"arch=compute_{VIRTUAL_ARCH if later else number},code=sm_{number}"]
        if name.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cuda_runtime(nvcc: str) -> Path | None:
    """The folder of the static CUDA runtime that belongs to nvcc, which may be a wrapper script."""
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    tops = [line.split("=", 1)[1].strip() for line in run.stderr.splitlines() if "TOP=" in line]
    for top in [Path(t) for t in tops] + [Path(nvcc).resolve().parent.parent]:
        for place in ("lib*", "targets/*/lib"):
            for found in top.glob(f"{place}/libcudart_static.a"):
                return found.parent.resolve()
    return None


def core_stamp() -> str:
    """What the core says it was built from; hierkernels.native compares it."""
    version = runpy.run_path(str(ROOT / "hierkernels" / "version.py"))["__version__"]
    return runpy.run_path(str(ROOT / "hierkernels" / "core_stamp.py"))["stamp"](version, CSRC)


def quote(value: object) -> str:
    """A path among ninja's; it quotes them for the shell itself."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def argument(value: object) -> str:
    """A word of a command, in the text of a rule."""
    return shlex.quote(str(value)).replace("$", "$$")


def ninja_file(cxx: str, nvcc: str | None, runtime: Path | None, build: Path, target: Path) -> str:
    import pybind11

    # The interpreter's and pybind11's headers are not ours to warn about.
    includes = [
        f"-isystem {argument(p)}"
        for p in (sysconfig.get_paths()["include"], pybind11.get_include())
    ]
    defines = ["-DHIERKERNELS_CUDA"] if nvcc else []
    # Kernels know neither: their objects serve a wheel built in isolation, or without CUDA, too.
    binding_flags = " ".join([*defines, *includes])
    cxx_flags = " ".join([*CXX_FLAGS, *(["-DHIERKERNELS_X86"] if X86 else [])])
    compiled = "-c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {argument(cxx)} -MMD -MF $out.d {cxx_flags} $flags {compiled}"
        "  description = C++ $in",
        f"rule link\n  command = {argument(cxx)} -shared -fopenmp $in -o $out $libs\n"
        "  description = link $out",
    ]
    if nvcc:
        nvcc_flags = " ".join(NVCC_FLAGS)
        lines.append(
            # What ptxas says of registers and spills goes to a file, for csrc/cuda/report.py.
            f"rule nvcc\n  command = {argument(nvcc)} -MD -MF $out.d {nvcc_flags} $archs -c $in "
            "-o $out > $out.ptxas 2>&1 || (cat $out.ptxas && false)\n"
            "  depfile = $out.d\n  deps = gcc\n  description = CUDA $in"
        )
    objects = []
    # CUDA first: a file takes up to a minute, and no core should be without work meanwhile.
    for source in (sorted(CSRC.rglob("*.cu")) if nvcc else []) + sorted(CSRC.rglob("*.cpp")):
        level = source.stem.rsplit("_", 1)[-1]
        if level in LEVEL_FLAGS and not X86:
            continue
        if "cuda" in source.relative_to(CSRC).parts and not nvcc:
            continue
        obj = build / source.relative_to(CSRC).with_suffix(".o")
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {quote(obj)}: {rule} {quote(source)}")
        if source.suffix == ".cu":
            archs = HOPPER_FLAGS if source.parent.name == "hopper" else cuda_architectures()
            lines.append(f"  archs = {' '.join(archs)}")
        if source == CSRC / "stamp.cpp":
            lines.append(f"  flags = '-DHIERKERNELS_STAMP=\"{core_stamp()}\"'")
        if source.stem.startswith("bindings"):
            lines.append(f"  flags = {binding_flags}")
        if level in LEVEL_FLAGS:
            lines.append(f"  flags = {' '.join(LEVEL_FLAGS[level])}")
        objects.append(quote(obj))
    lines.append(f"build {quote(target)}: link {' '.join(objects)}")
    if nvcc:
        lines.append(f"  libs = -L{argument(runtime)} -lcudart_static -lrt -lpthread -ldl")
    return "\n".join([*lines, f"default {quote(target)}", ""])


class NinjaBuild(build_ext):
    """Compiles everything with one ninja run; without a compiler there is no core."""

    def build_extension(self, ext: Extension) -> None:
        cxx = find_tool("HIERKERNELS_BUILD_CPU", ("CXX",), ("g++", "c++", "clang++"))
        if cxx is None:
            print("hierkernels: no C++ compiler: installing the reference and Triton backends only")
            return
        nvcc = find_tool("HIERKERNELS_BUILD_CUDA", ("NVCC",), ("nvcc", "/usr/local/cuda/bin/nvcc"))
        runtime = cuda_runtime(nvcc) if nvcc else None
        if nvcc and runtime is None:
            if wanted("HIERKERNELS_BUILD_CUDA") == "1":
                raise SystemExit(
                    f"HIERKERNELS_BUILD_CUDA=1, but {nvcc} has no libcudart_static.a beside it"
                )
            print("hierkernels: nvcc has no static CUDA runtime: building without the CUDA kernels")
            nvcc = None
        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(cxx, nvcc, runtime, build, target))
        command = [sys.executable, "-m", "ninja", "-C", str(build)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("hierkernels._native", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
