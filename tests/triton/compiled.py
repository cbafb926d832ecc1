"""Reports of the ahead-of-time compilation of all operators, made once for all test processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from process_lock import process_lock

# The tests compile for one architecture, `make compile-gpu` for all; so do those marked slow.
ARCH = 90

Report = dict  # the fields of hierkernels.triton_common.aot.Report
Reports = dict[str, list[Report]]  # by operator


def reports(factory: pytest.TempPathFactory, *options: str) -> Reports:
    """The reports of `python -m hierkernels.aot`, run by the process that is first to ask."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what the workers share
    path = folder / f"aot{''.join(options)}.json"
    with process_lock(path.with_suffix(".lock")):
        if not path.exists():
            _compile(path, *options)
    return json.loads(path.read_text())


def _compile(path: Path, *options: str) -> None:
    # This process may interpret.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hierkernels.aot", "--json", str(path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stdout + done.stderr


def select(reports: Reports, op: str, arch: int, case: str, channels: int) -> list[Report]:
    """The kernels of a case for an architecture."""
    key = {"arch": arch, "case": case, "channels": channels}
    return [r for r in reports[op] if key.items() <= r.items()]
