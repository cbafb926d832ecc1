"""Peak extra memory: what a call holds beyond its inputs and outputs.

On the CPU this is the high-water mark of the resident set, so scratch memory of native code counts.
`python -m benchmarks.memory BACKEND N` measures attention in a process of its own, where memory
that a library keeps from call to call counts as well; it prints one line of JSON.
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

from hierkernels import testing
from hierkernels.ops.attention.spec import Case

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (1024, 4096, 16384)
HEADS, CHANNELS = 1, 64  # one head: the eager reference at N = 16384 then needs some 6 GB


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
    scratch memory shows; a buffer that a library kept from an earlier call does not.
    """
    gc.collect()
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


def eager_needs(n: int) -> int:
    """Bytes that the eager reference needs at length n: up to six (N, N) tensors at a time."""
    return 6 * HEADS * n * n * 4


def length_case(n: int) -> Case:
    """Causal attention of N tokens, the case of the memory group."""
    return Case(f"memory-n{n}", 1, HEADS, HEADS, n, n, CHANNELS, CHANNELS, is_causal=True)


def measure_here(backend: str, n: int) -> dict[str, float | None]:
    """Peak extra bytes and seconds of one forward and backward, float32."""

    def attend(inputs: testing.Inputs) -> list[torch.Tensor]:
        inputs = inputs.requires_grad()
        out, lse = inputs.run(backend)
        return [out, lse, *testing.differentiate(inputs, out, lse).values()]

    attend(testing.make_inputs(length_case(16), torch.float32))  # loads the code
    inputs = testing.make_inputs(length_case(n), torch.float32)
    start = time.perf_counter()
    peak = peak_extra(lambda: attend(inputs), "cpu")
    return {"peak_extra_bytes": peak, "seconds": time.perf_counter() - start}


def measure(backend: str, n: int) -> dict[str, float | None]:
    """measure_here in a fresh process. Raises RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", backend, str(n)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(last[0])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]))))
