"""Builds the emulation and the library's CUDA sources with the host's compiler, and loads them.

Test code, never a backend for users. Incremental: ninja, in build/cuda_emulation.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from process_lock import process_lock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulation"
NAME = "_cuda_emulation"

_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
_FLAGS += ["-Wno-unknown-pragmas", "-Wno-parentheses", "-DHIERKERNELS_CUDA_EMULATION"]
# The hooks of the thread sanitiser tell the emulation of each access; locals start as a pattern.
_KERNEL_FLAGS = ["-x", "c++", "-fsanitize=thread", "-ftrivial-auto-var-init=pattern"]


class NoCompiler(RuntimeError):
    """There is no C++ compiler, or it cannot build the emulation's sources."""


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NoCompiler("no C++ compiler: set CXX or install g++")


def _path(value: object) -> str:
    """Among ninja's paths."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _word(value: object) -> str:
    """In the text of a command."""
    return shlex.quote(str(value)).replace("$", "$$")


def _ninja_file(cxx: str, target: Path) -> str:
    import pybind11

    includes = [
        *("-isystem", _word(sysconfig.get_paths()["include"])),
        *("-isystem", _word(pybind11.get_include())),
    ]
    flags = " ".join([*_FLAGS, _word(f"-I{HERE}"), _word(f"-I{CSRC}"), *includes])
    compiled = "-MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    lines = [
        f"rule cxx\n  command = {_word(cxx)} {flags} {compiled}",
        f"rule kernel\n  command = {_word(cxx)} {' '.join(_KERNEL_FLAGS)} {flags} {compiled}",
        f"rule link\n  command = {_word(cxx)} -shared $in -o $out",
    ]
    kernels = (CSRC / "cuda").rglob("*.cu")
    bindings = (CSRC / "bindings_tensor.cpp", CSRC / "cuda" / "bindings.cpp")
    sources = [*HERE.glob("*.cpp"), *HERE.glob("*.cu"), *kernels, *bindings]
    objects = []
    for source in sorted(sources):
        obj = BUILD / source.relative_to(ROOT).with_suffix(".o")
        rule = "kernel" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {_path(obj)}: {rule} {_path(source)}")
        objects.append(_path(obj))
    return "\n".join([*lines, f"build {_path(target)}: link {' '.join(objects)}", ""])


@functools.cache
def load() -> ModuleType:
    """The emulated core. Raises NoCompiler, or RuntimeError with the compiler's words."""
    target = BUILD / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ninja", "-C", str(BUILD)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    with process_lock(BUILD / "lock"):
        (BUILD / "build.ninja").write_text(_ninja_file(_compiler(), target))
        built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"the emulation does not compile:\n{built.stdout[-8000:]}")
    spec = importlib.util.spec_from_file_location(NAME, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
