"""Measures groups on request, in a process of its own, which alone a GPU's error ends.

The first line of output says what machine this is. Then each line of input is a request in JSON,
each line of output the answer:
    {"entry": name, "direction": "forward", "rows": [...], "seconds": 0.5}
        -> {"records": [...], "skipped": {row: reason}, "failed": {row: reason}, "roof": {...}}
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch._functorch.config

from benchmarks import machine
from benchmarks.device.cases import BF16, Entry, entries, tiny_entries
from benchmarks.measure import Group, Measurements, RowResult, median
from benchmarks.roof import Roof, RoofMeter

# Rounds of backward keep the graph; compiled graphs must then not give their buffers away.
torch._functorch.config.donated_buffer = False


class Worker:
    """Groups of some entries, with the roof measured beside them."""

    def __init__(self, roof: RoofMeter, entries: Sequence[Entry]) -> None:
        self.roof = roof
        self.entries = {entry.name: entry for entry in entries}
        self.measurements = Measurements(roof, 0.5, full=True, say=lambda line: None, total=0)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The records of a group's rows, and why others have none."""
        entry = self.entries[request["entry"]]
        group = Group(entry.suite, entry.case, entry.case.dtypes[0], request["direction"])
        self.measurements.budget_s = request["seconds"]
        results = self.measurements.group(group, request["rows"])
        timed = {row: result for row, result in results.items() if result.samples}
        return {
            "records": [record(group, row, result) for row, result in timed.items()],
            "skipped": {row: r.skipped for row, r in results.items() if r.skipped},
            "failed": {row: r.failed for row, r in results.items() if r.failed},
            "roof": asdict(self.roof.roof),
        }


def record(group: Group, row: str, result: RowResult) -> dict[str, Any]:
    """A row as pytest-benchmark writes it, as far as our reports read it."""
    samples = result.samples
    mean = sum(samples) / len(samples)
    return {
        "group": str(group),
        "name": f"test_time[{'-'.join((*group.key, row))}]",
        "extra_info": result.extra_info | {"row": row},
        "stats": {
            "min": min(samples),
            "max": max(samples),
            "mean": mean,
            "median": median(samples),
            "rounds": len(samples),
            "data": samples,
        },
    }


def add_roof_shares(records: Sequence[dict[str, Any]], roof: dict[str, Any]) -> None:
    """Writes each record's share of a roof as JSON has it, whose keys are strings."""
    rates = Roof(roof["flops"], {int(size): rate for size, rate in roof["memory"].items()})
    for r in records:
        info = r["extra_info"]
        info["roof_share"] = rates.share(info, r["stats"]["median"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small cases, as tests have them")
    options = parser.parse_args(arguments)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    roof = RoofMeter(options.device, BF16)
    if not options.tiny:
        roof.probe()
    hello = {"machine_info": machine.machine_info(options.device), "roof": asdict(roof.roof)}
    print(json.dumps(hello), file=answers, flush=True)
    worker = Worker(roof, tiny_entries() if options.tiny else entries())
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
