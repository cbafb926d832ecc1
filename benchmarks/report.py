"""A Markdown report with SVG plots: python -m benchmarks.report [JSON] [--out DIR]."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plots, suite
from benchmarks.table import Line, collect, memory_peaks, ops, peers

LATEST = Path(__file__).resolve().parent / "report" / "latest.json"


def load(path: Path) -> dict[str, Any]:
    """A result as pytest-benchmark wrote it."""
    return json.loads(path.read_text())


def write(data: dict[str, Any], out: Path) -> Path:
    """Writes report.md and its plots into a folder; returns the path of report.md."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw_all(data, out)
    path = out / "report.md"
    path.write_text("\n".join(_markdown(data, drawn)) + "\n")
    return path


def _markdown(data: dict[str, Any], drawn: list[str]) -> Iterator[str]:
    info, commit = data["machine_info"], data["commit_info"]
    yield "# hierkernels: benchmark report"
    yield ""
    changes = " with uncommitted changes" if commit.get("dirty") else ""
    yield f"{info['device']}, {info['isa']}, {info['threads']} threads, {info['system']}."
    yield f"hierkernels {info['hierkernels']}, torch {info['torch']}, triton {info['triton']},"
    yield f"Python {info['python']}. Commit {(commit.get('id') or 'unknown')[:12]}{changes},"
    yield f"{data['datetime'][:10]}."
    if roof := info.get("roof"):
        rates = ", ".join(
            f"{name} {rate * 1e-9:,.0f} GFLOP/s" for name, rate in roof["flops"].items()
        )
        yield "Roof, measured in this run: matrix product"
        yield f"{rates}; copy {roof['copy'] * 1e-9:.1f} GB/s."
    yield ""
    yield "Times are medians; the rows of a group were timed interleaved. Columns of peers hold"
    yield "their time over that of hierkernels: above 1, hierkernels is faster. `extra` is the peak"
    yield "memory beyond inputs and outputs."
    yield ""
    measured = collect(data)
    for op in ops(data):
        yield ""
        yield f"## {op}"
        yield ""
        for name in drawn:
            if name.startswith(f"{op}-"):
                yield f"![{name.replace('-', ' ')}]({name}.svg)"
        yield from _tables([line for line in measured if line.op == op])
        yield from _memory(op, memory_peaks(data, op))


def _tables(lines: list[Line]) -> Iterator[str]:
    """One for each case group of an op."""
    columns = peers(lines)
    for case_group in dict.fromkeys(line.case_group for line in lines):
        yield ""
        yield f"### {case_group}"
        yield ""
        header = ["case", "dtype", "pass", "ms", "GFLOP/s", "GB/s", "roof", "extra", *columns]
        yield "| " + " | ".join(header) + " |"
        yield "|" + "---|" * 3 + "---:|" * (len(header) - 3)
        for line in lines:
            if line.case_group == case_group:
                yield "| " + " | ".join(_cells(line, columns)) + " |"


def _memory(op: str, peaks: dict[str, dict[int, int]]) -> Iterator[str]:
    if not peaks:
        return
    sweep = suite.load(op).memory if op in suite.names() else None
    yield ""
    yield "### Peak memory"
    yield ""
    yield f"Forward and backward, {f'{sweep.title}, ' if sweep else ''}float32; MiB beyond inputs"
    yield "and outputs, each in a fresh process."
    yield ""
    yield "| N | " + " | ".join(plots.row_name(op, row) for row in peaks) + " |"
    yield "|---:|" + "---:|" * len(peaks)
    for n in sorted({n for by_length in peaks.values() for n in by_length}):
        found = (f"{peaks[row][n] / 2**20:,.1f}" if n in peaks[row] else "" for row in peaks)
        yield f"| {n} | " + " | ".join(found) + " |"


def _cells(line: Line, peers: list[str]) -> list[str]:
    cells = [line.case, line.dtype, line.direction]
    if line.ours is None:
        cells += ["-"] * 5
        return cells + [_milliseconds(line, peer) for peer in peers]
    info = line.rows[line.ours]["extra_info"]
    extra = info["peak_extra_bytes"]
    cells += [
        f"{line.seconds(line.ours) * 1e3:.4g}",
        f"{info['gflop_per_s']:,.0f}",
        f"{info['gb_per_s']:.1f}",
        f"{info['roof_share']:.0%}",
        "-" if extra is None else f"{extra / 2**20:.1f} MiB",
    ]
    ratios = (line.ratio(peer) for peer in peers)
    return cells + ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]


def _milliseconds(line: Line, row: str) -> str:
    return f"{line.seconds(row) * 1e3:.4g} ms" if row in line.rows else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "json", nargs="?", type=Path, default=LATEST, help="default: the latest run"
    )
    parser.add_argument("--out", type=Path, help="folder; default: that of the JSON file")
    arguments = parser.parse_args()
    if not arguments.json.exists():
        parser.error(f"{arguments.json} does not exist; run: pytest benchmarks --benchmark-only")
    print(write(load(arguments.json), arguments.out or arguments.json.parent))


if __name__ == "__main__":
    main()
