"""What plans of kernel launches are made of, and the way of a launch.

A plan only looks at shapes, strides and dtypes. A backend runs it; the ahead-of-time compiler
(aot.py) compiles the very same plan for other devices from tensors without memory.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

# Compiler options that a plan may name beside the kernel's arguments.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Target:
    """What a plan is for: a row of the configuration table and the precision of products."""

    family: str  # device.device_family
    precision: str  # "ieee" or "tf32" (matters for float32), "emulated" in the interpreter
    device: str = ""  # the name of the device, which may have a table of its own
    multiprocessors: int = 0  # of the device; 0 where none matters


# ---- what was compiled for earlier launches ----
#
# Triton works out a kernel's specialisation at each launch from Python, which takes longer than a
# small kernel. Launches that look the same to the compiler are found again by what they consist of:
# the numbers that a kernel is compiled for, as they are, and of the tensors dtype and alignment.

_MOST = 4096  # distinct launches that are remembered: strides may change from call to call
_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


_Parameters = tuple[tuple[str, ...], frozenset[int], frozenset[int]]
_parameters_of: dict[int, _Parameters] = {}  # by id: a kernel lives as long as its module


def _parameters(kernel: Any) -> _Parameters:
    """(names, which are compile-time ones, which are numbers that it is not compiled for)."""
    found = _parameters_of.get(id(kernel))
    if found is None:
        constants = frozenset(p.num for p in kernel.params if p.is_constexpr)
        free = frozenset(p.num for p in kernel.params if p.do_not_specialize) - constants
        found = tuple(p.name for p in kernel.params), constants, free
        _parameters_of[id(kernel)] = found
    return found


def _looks(kernel: Any, device: int | None, values: list[Any], options: tuple[Any, ...]) -> tuple:
    """All that the compiled kernel depends on."""
    _names, constants, free = _parameters(kernel)
    found: list[Any] = [id(kernel), device, options]
    add = found.append
    for n, value in enumerate(values):
        if n in constants:
            add(value)
        elif isinstance(value, torch.Tensor):
            add((value.dtype, value.data_ptr() % 16 == 0))
        elif n in free and type(value) is int:
            add(-(2**31) <= value < 2**31)
        else:
            add(float if type(value) is float else value)
    return tuple(found)


@dataclass(frozen=True)
class Launch:
    """One kernel launch; arguments by name, compile-time ones and compiler options included.

    The first argument of a kernel is a tensor, on whose device and current stream it runs.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name in tables: causal_sgu_forward."""
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")

    def run(self) -> None:
        if not isinstance(self.kernel, triton.JITFunction):  # interpreted
            self.kernel[(self.programs,)](**self.arguments)
            return
        device = self.arguments[_parameters(self.kernel)[0][0]].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._run_here(device)
        else:
            self._run_here(device)

    def _run_here(self, device: torch.device) -> None:
        if self.arguments.get("DESCRIPTORS"):  # which are written to memory that Triton asks for
            contextvars.copy_context().run(self._run_with_workspace, device)
        else:
            self._launch(device)

    def _run_with_workspace(self, device: torch.device) -> None:
        def allocate(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int8, device=device)

        triton.set_allocator(allocate)  # in this context alone: a caller's own stays as it is
        self._launch(device)

    def _launch(self, device: torch.device) -> None:
        arguments = self.arguments
        values = [arguments[name] for name in _parameters(self.kernel)[0]]
        options = tuple([arguments.get(name) for name in OPTIONS])
        key = _looks(self.kernel, device.index, values, options)
        found = _compiled.get(key)
        if found is not None and not self.kernel.pre_run_hooks:
            found[(self.programs, 1, 1)](*values)
            return
        found = self.kernel[(self.programs,)](**arguments)
        if isinstance(found, CompiledKernel):
            if len(_compiled) >= _MOST:
                _compiled.clear()
            _compiled[key] = found
