"""Loads the compiled core, hierkernels._native, on first use."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch  # first: the core then shares PyTorch's OpenMP runtime and thread pool

from hierkernels.core_stamp import REBUILD, is_stale, misfit
from hierkernels.version import __version__

CPU_ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")  # each a superset of the one before

_CSRC = Path(__file__).resolve().parents[1] / "csrc"  # in a checkout

_error = "not loaded yet"


def kernels_of(isa: str, dtype: torch.dtype) -> str:
    """The instruction set whose kernels compute dtype at the level isa.

    The kernels of avx512bf16 and amx are for bfloat16; for the rest these levels take avx512's.
    """
    return "avx512" if isa in ("avx512bf16", "amx") and dtype != torch.bfloat16 else isa


@functools.cache
def native() -> Any:
    """The compiled module, or None (native_error() then says why).

    Warns of a core that was built from other sources than those beside it. One whose functions
    differ from what this package calls, or of another version, is not used.

    Raises ValueError if HIERKERNELS_CPU_ISA names no instruction set; one that the machine lacks
    caps nothing.
    """
    global _error
    cap = os.environ.get("HIERKERNELS_CPU_ISA")
    if cap and cap not in CPU_ISAS:
        raise ValueError(f"HIERKERNELS_CPU_ISA must be one of {', '.join(CPU_ISAS)}, got {cap!r}")
    try:
        module = importlib.import_module("hierkernels._native")
    except ImportError as error:
        _error = f"{error}; {REBUILD}"
        return None
    built_from = getattr(module, "built_from", None)
    if reason := misfit(built_from, __version__, _CSRC):
        _error = f"{reason}; {REBUILD}"
        warnings.warn(f"hierkernels: {_error}", RuntimeWarning, stacklevel=2)
        return None
    if is_stale(built_from, __version__, _CSRC):
        warnings.warn(
            f"hierkernels: the compiled core is older than csrc; {REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
    _error = ""
    return module


def native_error() -> str:
    """Why native() is None."""
    return _error
