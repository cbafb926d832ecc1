"""A GPU that is not there: launches are recorded, nothing is compiled unless asked for.

Fake tensors of a CUDA device get addresses, the driver of Triton is replaced by one that counts
what is compiled (for which kernel) and notes every launch. So the whole way from an operator's
backend to the launch runs on a machine without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hierkernels.triton_common import device, launch


@dataclass(frozen=True)
class Launched:
    """One launch as the driver sees it."""

    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    values: tuple[Any, ...]


@dataclass
class FakeGPU:
    """What happened, and what the device is."""

    capability: tuple[int, int] = (9, 0)
    shared: int = 227 * 1024
    name: str = "NVIDIA H100"
    current: int = 0  # device
    streams: dict[int, int] = field(default_factory=dict)  # device -> stream
    compiled: list[str] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)
    hip: str | None = None

    # the driver's interface
    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, index: int) -> int:
        return self.streams.get(index, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.current)


class _Kernel(CompiledKernel):
    """A kernel without code, that notes its launches."""

    def __init__(self, gpu: FakeGPU, name: str) -> None:
        self.gpu, self.name, self.function, self.packed_metadata = gpu, name, 0, ()
        self.module = None

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> None:
        return None

    @property
    def run(self) -> Any:
        def launch(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            # function, metadata (two), hooks (two), then the kernel's arguments
            seen = Launched(self.name, self.gpu.current, stream, (x, y, z), rest[5:])
            self.gpu.launched.append(seen)

        return launch


@contextmanager
def _on_device(gpu: FakeGPU, index: Any) -> Iterator[None]:
    before = gpu.current
    gpu.current = torch.device(index).index
    try:
        yield
    finally:
        gpu.current = before


def install(patch: pytest.MonkeyPatch, **properties: Any) -> FakeGPU:
    """Puts a fake GPU in the place of the driver, until patch is undone."""
    gpu = FakeGPU(**properties)

    def compile_nothing(self: JITFunction, key: Any, _signature: Any, index: int, *_: Any) -> Any:
        gpu.compiled.append(self.__name__)
        kernel = _Kernel(gpu, self.__name__)
        self.device_caches[index][0][key] = kernel
        return kernel

    def properties_of(_index: Any) -> SimpleNamespace:
        major, minor = gpu.capability
        return SimpleNamespace(
            name=gpu.name,
            major=major,
            minor=minor,
            shared_memory_per_block_optin=gpu.shared,
            multi_processor_count=132,
        )

    patch.setattr(driver, "_active", gpu)
    patch.setattr(JITFunction, "_do_compile", compile_nothing)
    patch.setattr(torch.version, "hip", gpu.hip)
    patch.setattr(torch.cuda, "get_device_properties", properties_of)
    patch.setattr(torch.cuda, "current_device", lambda: gpu.current)
    patch.setattr(torch.cuda, "device", lambda index: _on_device(gpu, index))
    patch.setattr(FakeTensor, "data_ptr", lambda t: 4096 + 2 * t.storage_offset())
    patch.setattr(launch, "_compiled", {})
    for remembered in (device._device, device._gpu_reasons, device._gpu_target):
        remembered.cache_clear()
    return gpu


def forget() -> None:
    """Drops what our kernels' caches hold: made for this driver, or for another one."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("hierkernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()


class _WithoutGuards(TorchFunctionMode):
    """Slices and copies by operators: the methods ask for the device, which a CPU build refuses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.contiguous:
            t = args[0]
            whole = torch.contiguous_format
            return t if t.is_contiguous() else torch.ops.aten.clone(t, memory_format=whole)
        if func is torch.Tensor.__getitem__:
            return _index(*args)
        return func(*args, **(kwargs or {}))


def _index(t: torch.Tensor, index: Any) -> torch.Tensor:
    """t[index], of one tensor, or of numbers, slices, None and Ellipsis."""
    if isinstance(index, torch.Tensor):
        return torch.ops.aten.index(t, [index])
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        named = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (t.dim() - named)
    axis = 0
    for part in parts:
        if part is None:
            t = t.unsqueeze(axis)
        elif isinstance(part, slice):
            t = torch.ops.aten.slice(t, axis, part.start, part.stop, part.step or 1)
        else:
            t = t.select(axis, part)
            axis -= 1
        axis += 1
    return t


@contextmanager
def fake_mode() -> Iterator[None]:
    """Inside, tensors have no memory and may be on any device."""
    with _WithoutGuards(), FakeTensorMode():
        yield
