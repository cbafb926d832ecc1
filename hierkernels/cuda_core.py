"""The compiled CUDA core, and where its kernels can run."""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

import torch

from hierkernels.native import native, native_error

# Set by tests alone: the same kernels, run on the CPU by the emulation of tests/cuda/emulation.
emulated_core: ModuleType | None = None


def core() -> Any:
    """The module with the cuda_* functions; device_reasons() says whether there is one."""
    return native() if emulated_core is None else emulated_core


def device_reasons(name: str, t: torch.Tensor) -> list[str]:
    """Why the CUDA kernels cannot run on the device of t, an argument's name; empty if they can."""
    kind = t.device.type
    if emulated_core is not None:
        return [] if kind == "cpu" else [f"{name} is on a {kind} device, the emulation needs CPU"]
    reasons = []
    if kind != "cuda":
        reasons.append(f"{name} is on a {kind} device, the cuda backend needs a GPU")
    if native() is None:
        reasons.append(f"the compiled kernels are missing: {native_error()}")
    elif native().cuda_version is None:
        reasons.append("the compiled core was built without CUDA: build it where nvcc is found")
    if kind == "cuda" and not reasons:
        if torch.version.hip is not None:
            return ["this PyTorch is for AMD devices"]
        if torch.cuda.get_device_capability(t.device) < (8, 0):
            return ["the device has a compute capability below 8.0"]
    return reasons


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors_of(t: torch.Tensor) -> int:
    """Of the device of t; the emulation has one."""
    return _multiprocessors(t.device.index) if t.is_cuda else 1


def stream_of(t: torch.Tensor) -> int:
    """The handle of the stream that work on t goes to."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def on_device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside, launches go to the device of t."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
