"""Keeps freed memory in the process, for programs that do the same step over and over."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_NEVER, _LARGEST = -1, 1 << 30


def keep_freed_memory() -> bool:
    """Tensors on the CPU below 1 GiB take memory that others left; true if the system can do so.

    The C library of Linux asks the system for every tensor from 32 MiB on and gives it back
    afterwards, so each step writes to pages that must be found and zeroed first. With this, memory
    once used stays with the process. All of the process: a script may decide that, no library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    # 1 GiB is beyond what releases of glibc before 2.35 accept; they refuse and stay as they are.
    return bool(
        library.mallopt(_MMAP_THRESHOLD, _LARGEST) and library.mallopt(_TRIM_THRESHOLD, _NEVER)
    )
