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
