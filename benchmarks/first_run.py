"""The first minutes on a GPU: build, tests, compute-sanitizer, tuning, benchmark.

    python -m benchmarks.first_run [--logs DIR] [--only STEP ...] [--from STEP]
    python -m benchmarks.first_run --list         # the steps, their commands and limits

Each step has a time limit and a log of its own, and the next one begins whatever became of it. The
summary, printed and written to summary.json after each step, says how each ended. The exit status
is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
# The sanitizer makes all a hundred times slower: a few shapes, for each kernel and way of packing.
SANITIZED = (
    "bfloat16 and (n65 or short-29 or g3-hkv2 or d128 or bias-hqk-g3 or h-causal-n129 or h-g2"
    " or window-n100 or g16) and not logit"
)
PYTEST = (PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu")


@dataclass(frozen=True)
class Step:
    """A command, and for how many seconds it may run."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    needs: str = ""  # a program; without it the step is skipped
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Ended:
    """How a step ended: ok, failed (status), out of time, skipped (reason)."""

    step: str
    verdict: str
    seconds: float
    log: str


def _sanitizer(tool: str, limit_s: int) -> Step:
    command = (
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
        *PYTEST, "tests/cuda", "-k", SANITIZED,
    )  # fmt: skip
    # PyTorch's caching allocator would hide accesses beyond a tensor's end.
    allocator = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(tool, command, limit_s, "compute-sanitizer", allocator)


def steps() -> list[Step]:
    """In the order in which they are of use: what shows a wrong result first, then speed."""
    build = (PYTHON, "setup.py", "-q", "build_ext", "--inplace")
    return [
        Step("info", (PYTHON, "-m", "hierkernels.info"), 60),
        Step("build", build, 600, "nvcc", (("HIERKERNELS_BUILD_CUDA", "1"),)),
        Step("cuda-report", (PYTHON, "csrc/cuda/report.py"), 60, "nvcc"),
        Step("tests", (*PYTEST, "tests/cuda"), 240),
        _sanitizer("memcheck", 240),
        _sanitizer("racecheck", 240),
        Step("all-tests", (*PYTEST, "tests", "--ignore=tests/cuda"), 600),
        Step("tune", (PYTHON, "-m", "hierkernels.tune", "--candidates", "12"), 600),
        Step("benchmark", (PYTHON, "-m", "benchmarks.device"), 660),
    ]


def run_step(step: Step, logs: Path) -> Ended:
    """Runs a step and all that it starts; ends it at its limit."""
    log = logs / f"{step.name}.log"
    if step.needs and shutil.which(step.needs) is None:
        return Ended(step.name, f"skipped: no {step.needs}", 0.0, "")
    begin = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | dict(step.environment)
    with log.open("w") as out:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(step.limit_s)
            verdict = "ok" if status == 0 else f"failed: status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            verdict = f"failed: out of time ({step.limit_s} s)"
    return Ended(step.name, verdict, round(time.monotonic() - begin, 1), str(log))


def run(chosen: Sequence[Step], logs: Path) -> list[Ended]:
    """All steps, one after the other; the summary is written after each."""
    logs.mkdir(parents=True, exist_ok=True)
    found: list[Ended] = []
    for step in chosen:
        print(f"{step.name}: {' '.join(step.command)}", flush=True)
        ended = run_step(step, logs)
        found.append(ended)
        print(f"{step.name}: {ended.verdict}, {ended.seconds:.0f} s  {ended.log}", flush=True)
        (logs / "summary.json").write_text(json.dumps([asdict(e) for e in found], indent=1))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    names = [step.name for step in steps()]
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.first_run",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "first_run")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help="these steps")
    parser.add_argument("--from", dest="first", choices=names, help="this step and the later ones")
    parser.add_argument("--list", action="store_true", help="print the steps and run nothing")
    options = parser.parse_args(arguments)
    first = names.index(options.first) if options.first else 0
    chosen = [s for s in steps()[first:] if options.only is None or s.name in options.only]
    if options.list:
        for step in chosen:
            print(f"{step.name:12s}{step.limit_s:5d} s  {' '.join(step.command)}")
        return 0
    found = run(chosen, options.logs)
    return 1 if any(e.verdict.startswith("failed") for e in found) else 0


if __name__ == "__main__":
    sys.exit(main())
