"""Benchmarks on a GPU, bfloat16, in one command that takes ten minutes.

    python -m benchmarks.device [--minutes 10] [-k TEXT] [--output FILE]
    python -m benchmarks.device --dry-run         # without a GPU: what would be measured

Attention and decoding against each kernel of F.scaled_dot_product_attention and flex_attention,
the gating unit against masked einsum and a dense product, selected attention against fla-core,
native sparse attention at 65536 tokens. Every row is checked against a float64 oracle before it is
timed; times are medians, with the L2 cache flushed between samples. The result goes to
benchmarks/results/<device>-device.json, after each group anew. What there is no time for is left
out, from the end of the list.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, table
from benchmarks.device.cases import BF16, Entry, entries, tiny_entries
from benchmarks.device.schedule import Budget, NoWorker, Outcome, Process, Run
from benchmarks.device.worker import add_roof_shares

RESULTS = Path(__file__).resolve().parents[1] / "results"


def parser() -> argparse.ArgumentParser:
    description, _, more = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        "python -m benchmarks.device",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--minutes", type=float, default=10.0, help="of the whole run (default: 10)")
    p.add_argument("--seconds", type=float, default=1.0, help="of timing a group (default: 1)")
    p.add_argument("-k", metavar="TEXT", default="", help="only entries whose name contains this")
    p.add_argument("--output", type=Path, help="the result's file")
    p.add_argument("--dry-run", action="store_true", help="print the groups, measure nothing")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    p.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return p


def show_plan(chosen: Sequence[Entry], minutes: float) -> None:
    """Each group with its rows, FLOPs and bytes, and whether the estimates leave time for it."""
    used = 0.0
    for entry in chosen:
        used += entry.seconds
        verdict = "" if used <= 60 * minutes else "  (if time is left)"
        for direction in entry.directions:
            flops = entry.case.flops(direction) * 1e-12
            moved = entry.case.bytes(BF16[0], direction) * 1e-9
            work = f"{flops:9.3f} TFLOP{moved:9.3f} GB"
            print(f"{entry.name:58s}{direction:9s}{work}  {' '.join(entry.rows)}{verdict}")
    groups = sum(len(entry.directions) for entry in chosen)
    print(f"{groups} groups, about {used:.0f} s of {60 * minutes:.0f} s")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """A result as benchmarks.report reads it."""
    add_roof_shares(outcome.records, outcome.roof)
    return {
        "machine_info": outcome.machine_info | {"roof": outcome.roof},
        "commit_info": machine.commit_info(),
        "benchmarks": outcome.records,
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
        "skipped": outcome.skipped,
        "failed": outcome.failed,
        "left_out": outcome.left_out,
    }


def write(output: Path | None, outcome: Outcome) -> None:
    """Writes what there is so far."""
    if outcome.records:
        path = output or RESULTS / f"{machine.slug(outcome.machine_info)}-device.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_json(outcome), indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a row failed, or nothing was measured."""
    options = parser().parse_args(arguments)
    chosen = [e for e in (tiny_entries() if options.tiny else entries()) if options.k in e.name]
    if not chosen:
        print(f"no entry's name contains {options.k!r}", file=sys.stderr)
        return 1
    if options.dry_run:
        show_plan(chosen, options.minutes)
        return 0
    worker = ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    run = Run(
        functools.partial(Process, worker),
        Budget(60 * options.minutes),
        options.seconds,
        functools.partial(print, flush=True),
        functools.partial(write, options.output),
    )
    try:
        outcome = run.run(chosen)
    except NoWorker as error:
        print(f"no worker can be started: {error}", file=sys.stderr)
        return 1
    for kind in ("skipped", "failed"):
        for where, reason in getattr(outcome, kind).items():
            print(f"{kind}: {where}: {reason}")
    for where in outcome.left_out:
        print(f"no time left for {where}")
    if outcome.records:
        for line in table.lines(as_json(outcome)):
            print(line)
    write(options.output, outcome)
    return 1 if outcome.failed or not outcome.records else 0


if __name__ == "__main__":
    sys.exit(main())
