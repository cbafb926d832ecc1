"""A lock between processes: workers of pytest-xdist come to the same work at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows; there, run the tests in one process
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def process_lock(path: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same file; one that dies leaves it open."""
    if fcntl is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
