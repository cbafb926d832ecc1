"""Loads the compiled core, hierkernels._native, on first use."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch  # first: the core then shares PyTorch's OpenMP runtime and thread pool

_error = "not loaded yet"


@functools.cache
def native() -> Any:
    """The compiled module, or None (native_error() then says why)."""
    global _error
    try:
        module = importlib.import_module("hierkernels._native")
    except ImportError as error:
        _error = f"{error}; build it with: python setup.py build_ext --inplace"
        return None
    module.set_dtypes(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64)
    )
    _error = ""
    return module


def native_error() -> str:
    """Why native() is None."""
    return _error
