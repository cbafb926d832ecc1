"""Measures which configurations of the Triton kernels are fastest on this GPU, and remembers them.

    python -m hierkernels.tune [--kernel NAMES] [--case NAMES] [--output FILE]
    python -m hierkernels.tune --dry-run --device sm_90    # without a GPU: what would be timed

For every kernel and bucket of shapes the candidates are compiled first, and those that spill or do
not fit are dropped; the others are timed, with the L2 cache flushed, by their median. The table
goes to the user's cache, where the package finds it (hierkernels/triton_common/configs.py); entries
of other buckets stay in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hierkernels.triton_common.configs import Config
    from hierkernels.triton_common.search import Task

FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100")


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("python -m hierkernels.tune", description=description)
    parser.add_argument("--dry-run", action="store_true", help="compile and drop, but time nothing")
    parser.add_argument("--device", choices=FAMILIES, help="for --dry-run: the devices to plan for")
    parser.add_argument("--kernel", nargs="*", help="only these kernels: attention_forward, ...")
    parser.add_argument("--case", nargs="*", help="only calls of these names: causal, short, ...")
    parser.add_argument(
        "--candidates", type=int, default=64, metavar="N",
        help="for each kernel and bucket the N that are nearest to the heuristic's (default: 64)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="the table's file (default: the user's cache)")
    jobs = max(1, (os.cpu_count() or 1))
    parser.add_argument("--jobs", type=int, default=jobs, help="compilers that run at once")
    return parser


def _fitting(task: Task, family: str, limit: int, jobs: int) -> list[Config]:
    """The candidates of a task that fit the device, each judgement printed."""
    from hierkernels.triton_common import search

    tried = search.candidates(task, family, limit)
    print(f"{task}: {len(tried)} candidates", flush=True)
    kept = []
    for config, report in search.compiled(task, tried, family, jobs):
        uses = f"{report.registers:4d} registers {report.shared / 1024:6.1f} KiB"
        verdict = f"dropped: {report.problem}" if report.problem else "kept"
        print(f"  {config!s:28s}{uses}  {verdict}", flush=True)
        if not report.problem:
            kept.append(config)
    return kept


def _timed(task: Task, kept: list[Config], family: str) -> dict[str, Any] | None:
    """The fastest configuration as a table's entry, progress printed; None if none ran."""
    from hierkernels.triton_common import configs, search

    times: dict[Config, float] = {}
    for i, config in enumerate(kept, 1):
        try:
            times[config] = search.microseconds(task, config, family, "cuda")
            print(f"  {i}/{len(kept)} {config!s:28s}{times[config]:10.1f} us", flush=True)
        except RuntimeError as error:  # what the compiler promised, the device may refuse
            print(f"  {i}/{len(kept)} {config!s:28s} failed: {str(error)[:80]}", flush=True)
    if not times:
        return None
    best = min(times, key=lambda config: times[config])
    standard = times.get(task.heuristic, float("nan"))
    print(f"  fastest: {best}, {times[best]:.1f} us (the heuristic's: {standard:.1f} us)")
    return configs.entry_of(best, times[best], standard)


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if every task has a configuration that fits."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed, so there are no kernels to tune")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("interpreted kernels cannot be tuned: unset TRITON_INTERPRET")
    if options.dry_run and options.device is None:
        parser.error("--dry-run needs --device: " + ", ".join(FAMILIES))
    if options.device is not None and not options.dry_run:
        parser.error("--device is for --dry-run; what is timed is the GPU at hand")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error(
            "no GPU is there (torch.cuda.is_available() is False); "
            "--dry-run --device sm_90 shows what would be timed"
        )
    if options.candidates < 1:
        parser.error(f"--candidates must be at least 1, got {options.candidates}")

    from hierkernels.triton_common import configs, search
    from hierkernels.triton_common.device import device_family

    name, family = "", options.device
    if not options.dry_run:
        name, family = (
            torch.cuda.get_device_name(),
            device_family(torch.cuda.get_device_capability()),
        )
    path = options.output or configs.user_folder() / configs.file_name(name)
    todo = search.tasks(family, options.kernel, options.case)
    if not todo:
        parser.error("no kernel and call of these names")
    start, unserved = time.monotonic(), 0
    for n, task in enumerate(todo, 1):
        print(f"[{n}/{len(todo)}, {time.monotonic() - start:.0f} s] ", end="")
        kept = _fitting(task, family, options.candidates, options.jobs)
        unserved += not kept
        print(f"  {len(kept)} {'would be' if options.dry_run else 'are'} timed")
        if kept and not options.dry_run:
            entry = _timed(task, kept, family)
            if entry is not None:
                configs.write_table(path, name, {task.kernel: {task.bucket: entry}})
    if not options.dry_run:
        print(f"written: {path}")
    return 1 if unserved else 0


if __name__ == "__main__":
    sys.exit(main())
