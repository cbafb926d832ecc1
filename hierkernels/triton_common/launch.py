"""What plans of kernel launches are made of.

A plan only looks at shapes, strides and dtypes. A backend runs it; the ahead-of-time compiler
(aot.py) compiles the very same plan for other devices from tensors without memory.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Target:
    """What a plan is for: a row of the configuration table and the precision of products."""

    family: str  # device.device_family
    precision: str  # "ieee" or "tf32" (matters for float32), "emulated" in the interpreter
    device: str = ""  # the name of the device, which may have a table of its own


@dataclass(frozen=True)
class Launch:
    """One kernel launch; arguments by name, compile-time ones and compiler options included."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name in tables: causal_sgu_forward."""
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")

    def run(self) -> None:
        if self.arguments.get("DESCRIPTORS"):  # which are written to memory that Triton asks for
            contextvars.copy_context().run(self._run_with_workspace)
        else:
            self.kernel[(self.programs,)](**self.arguments)

    def _run_with_workspace(self) -> None:
        device = self.arguments["q_ptr"].device

        def allocate(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int8, device=device)

        triton.set_allocator(allocate)  # in this context alone: a caller's own stays as it is
        self.kernel[(self.programs,)](**self.arguments)
