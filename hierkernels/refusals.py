"""Reasons for which backends refuse a call, where several operators have the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hierkernels.native import native, native_error

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_DTYPES = (*GPU_DTYPES, torch.float64)


def cpu_reasons(name: str, t: torch.Tensor) -> list[str]:
    """Why the compiled kernels cannot compute on t, an argument's name; empty if they can."""
    if t.is_cpu and t.dtype in CPU_DTYPES and native() is not None:
        return []
    reasons = []
    if not t.is_cpu:
        reasons.append(f"{name} is on a {t.device.type} device, the cpu backend needs CPU tensors")
    if native() is None:
        reasons.append(f"the compiled kernels are missing: {native_error()}")
    return reasons + dtype_reasons(t.dtype, CPU_DTYPES)


def dtype_reasons(dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> list[str]:
    """That a dtype is not one of those that kernels know."""
    if dtype in allowed:
        return []
    names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
    return [f"dtype {dtype} is not one of {names}"]


def channel_reasons(most: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """That tensors, given with their names, have more channels than kernels know."""
    return [
        f"{name} has {t.shape[-1]} channels, at most {most} are supported"
        for name, t in tensors
        if t.shape[-1] > most
    ]
