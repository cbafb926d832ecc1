"""Peak extra memory: what a call holds beyond its inputs and outputs.

On the CPU this is the high-water mark of the resident set, so scratch memory of native code counts.
`python -m benchmarks.memory SUITE ROW N` measures a row in a process of its own, where memory that
a library keeps from call to call counts as well; it prints one line of JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.suite import differentiate, load

ROOT = Path(__file__).resolve().parent.parent


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def available() -> int:
    """Bytes of memory that can be had without swapping; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail")), 0)


def peak_extra(run: Callable[[], Sequence[torch.Tensor]], device: str) -> int | None:
    """Peak bytes of a call beyond what was there before and beyond the outputs it returns.

    None where it cannot be measured. Pages that the allocator kept are given back first, so that
    scratch memory shows; a buffer that a library kept from an earlier call does not. Python's
    garbage should be collected before: what the call gives back of it makes the peak look lower.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            before = _status("VmRSS")
            outputs = run()
            peak = _status("VmHWM") - before
        except (OSError, AttributeError):
            return None
    return max(0, peak - sum(t.nbytes for t in outputs))


def measure_here(suite_name: str, row: str, n: int) -> dict[str, float | None]:
    """Peak extra bytes and seconds of one forward and backward, float32, of a suite's sweep."""
    suite = load(suite_name)
    assert suite.memory is not None, f"{suite_name} has no memory sweep"

    def prepare(n: int) -> Callable[[], Sequence[torch.Tensor]]:
        inputs = suite.inputs(suite.memory.case(n), torch.float32, "cpu")
        candidate = next(iter(suite.candidates(row, inputs, "backward")))

        def run() -> Sequence[torch.Tensor]:
            inputs = candidate.inputs.requires_grad()
            out = candidate.function(inputs)
            return [out, *differentiate(inputs, out).values()]

        return run

    prepare(suite.memory.lengths[0] // 4)()  # loads the code
    run = prepare(n)
    gc.collect()
    start = time.perf_counter()
    peak = peak_extra(run, "cpu")
    return {"peak_extra_bytes": peak, "seconds": time.perf_counter() - start}


def measure(suite_name: str, row: str, n: int) -> dict[str, float | None]:
    """measure_here in a fresh process. Raises RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", suite_name, row, str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(last[0])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
