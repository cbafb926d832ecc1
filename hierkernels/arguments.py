"""Checks of plain arguments that several operators share; the errors name the argument."""

from __future__ import annotations

from typing import Any

import torch

LARGEST = 2**30  # of counts, widths and positions: what is computed from them then fits 64 bits


def check_int(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """value, or TypeError if it is no int, ValueError if it is not in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be at least {least} and at most {most}, got {value}")
    return value  # type: ignore[return-value]  # a SymInt is as good


def check_flag(name: str, value: Any) -> bool:
    """value, or TypeError if it is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


HALVES = (torch.bfloat16, torch.float16)


def check_parameter_dtype(name: str, t: torch.Tensor, of: str, dtype: torch.dtype) -> None:
    """TypeError unless t is in the dtype of the argument `of`, or in float32 beside 16 bits."""
    if t.dtype != dtype and not (dtype in HALVES and t.dtype == torch.float32):
        names = f"{dtype} or torch.float32" if dtype in HALVES else f"{dtype}"
        raise TypeError(f"{name} must be {names} where {of} is {dtype}, got {t.dtype}")


def device_type(t: torch.Tensor) -> str:
    """The type of t's device; of CPUs in a tenth of the time of t.device.type."""
    return "cpu" if t.is_cpu else t.device.type


_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The arguments in the dtype that autocast asks for; the first is no None, others may be.

    If one is no tensor of a type that autocast casts, all stay as they are, for the checks.
    """
    first = tensors[0]
    if not isinstance(first, torch.Tensor):
        return tensors
    kind = device_type(first)
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return tensors  # such as "meta", of which is_autocast_enabled knows nothing
    if not torch.is_autocast_enabled(kind):
        return tensors
    for t in tensors:
        if t is not None and not (isinstance(t, torch.Tensor) and t.dtype in _AUTOCAST):
            return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in tensors)
