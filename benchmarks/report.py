"""A Markdown report with SVG plots: python -m benchmarks.report [JSON] [--out DIR]."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.rows import PEER_ROWS
from benchmarks.table import HIERKERNELS_ROWS, Line, collect, memory_peaks

LATEST = Path(__file__).resolve().parent / "report" / "latest.json"
COLOURS = {
    "cpu": "#d1495b", "cuda": "#d1495b", "triton": "#edae49", "eager": "#8d99ae",
    "sdpa": "#00798c", "compiled": "#30638e", "flex": "#6a994e",
}  # fmt: skip
NAMES = {
    "cpu": "hierkernels cpu", "cuda": "hierkernels cuda", "triton": "hierkernels triton",
    "eager": "eager reference", "compiled": "torch.compile", "flex": "flex_attention",
    "sdpa": "F.scaled_dot_product_attention",
}  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    """A result as pytest-benchmark wrote it."""
    return json.loads(path.read_text())


def write(data: dict[str, Any], out: Path) -> Path:
    """Writes report.md and its plots into a folder; returns the path of report.md."""
    out.mkdir(parents=True, exist_ok=True)
    plots = [name for name, draw in PLOTS.items() if _draw(draw, data, out / f"{name}.svg")]
    path = out / "report.md"
    path.write_text("\n".join(_markdown(data, plots)) + "\n")
    return path


def _markdown(data: dict[str, Any], plots: list[str]) -> Iterator[str]:
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
    for name in plots:
        yield f"![{name.replace('-', ' ')}]({name}.svg)"
    lines = collect(data)
    peers = [peer for peer in PEER_ROWS if any(peer in line.rows for line in lines)]
    for case_group in dict.fromkeys(line.case_group for line in lines):
        yield ""
        yield f"## {case_group}"
        yield ""
        header = ["case", "dtype", "pass", "ms", "GFLOP/s", "GB/s", "roof", "extra", *peers]
        yield "| " + " | ".join(header) + " |"
        yield "|" + "---|" * 3 + "---:|" * (len(header) - 3)
        for line in lines:
            if line.case_group == case_group:
                yield "| " + " | ".join(_cells(line, peers)) + " |"
    peaks = memory_peaks(data)
    if peaks:
        yield ""
        yield "## Peak memory"
        yield ""
        yield "Forward and backward, causal, float32, one head of 64 channels; MiB beyond inputs"
        yield "and outputs, each in a fresh process."
        yield ""
        yield "| N | " + " | ".join(NAMES[row] for row in peaks) + " |"
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


def _draw(
    draw: Callable[[dict[str, Any]], Figure | None], data: dict[str, Any], path: Path
) -> bool:
    """Saves a plot, the same bytes for the same data; False if the data has nothing to show."""
    with plt.rc_context({"svg.hashsalt": "hierkernels", "font.size": 9, "axes.grid": True}):
        figure = draw(data)
        if figure is None:
            return False
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return True


def _row_order(rows: Any) -> list[str]:
    return [row for row in (*HIERKERNELS_ROWS, *PEER_ROWS) if row in rows]


def plot_time(data: dict[str, Any]) -> Figure | None:
    """Time against length: causal, (1, 8, N, 64), a panel for each dtype and direction."""
    series: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for line in collect(data):
        for row, record in line.rows.items():
            B, Hq, _, N, _, D, _ = record["extra_info"]["shape"]
            if line.case != f"long-1x8x{N}x64" or (B, Hq, D) != (1, 8, 64):
                continue
            panel = series.setdefault((line.dtype, line.direction), {})
            panel.setdefault(row, []).append((N, line.seconds(row) * 1e3))
    if not series:
        return None
    figure, axes = plt.subplots(1, len(series), figsize=(3.2 * len(series), 3), squeeze=False)
    for axis, ((dtype, direction), rows) in zip(axes[0], series.items(), strict=True):
        for row in _row_order(rows):
            lengths, times = zip(*sorted(rows[row]), strict=True)
            axis.plot(lengths, times, "o-", ms=3, color=COLOURS[row], label=NAMES[row])
        axis.set(xscale="log", yscale="log", xlabel="N", title=f"{dtype} {direction}")
        every = sorted({n for points in rows.values() for n, _ in points})
        axis.set_xticks(every, [str(n) for n in every])
        axis.minorticks_off()
    axes[0][0].set_ylabel("ms")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("Causal attention, (1, 8, N, 64)")
    figure.tight_layout()
    return figure


def plot_memory(data: dict[str, Any]) -> Figure | None:
    """Peak extra memory against length."""
    peaks = memory_peaks(data)
    if not peaks:
        return None
    figure, axis = plt.subplots(figsize=(4.5, 3))
    for row in _row_order(peaks):
        lengths = sorted(peaks[row])
        sizes = [max(peaks[row][n], 2**12) / 2**20 for n in lengths]
        axis.plot(lengths, sizes, "o-", ms=3, color=COLOURS[row], label=NAMES[row])
    every = sorted({n for by_length in peaks.values() for n in by_length})
    axis.set(xscale="log", yscale="log", xlabel="N", ylabel="MiB beyond inputs and outputs")
    axis.set_xticks(every, [str(n) for n in every])
    axis.minorticks_off()
    axis.legend(fontsize=7)
    axis.set_title("Peak memory, forward and backward, float32")
    return figure


def plot_roof(data: dict[str, Any]) -> Figure | None:
    """Share of the roof of hierkernels and of SDPA, a bar for each long and short group."""
    shown = [line for line in collect(data) if line.case_group in ("long", "short")]
    shown = [line for line in shown if line.ours or "sdpa" in line.rows]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(7, 0.22 * len(shown) + 1))
    for place, line in enumerate(shown):
        rows = [row for row in (line.ours, "sdpa") if row in line.rows]
        for lane, row in enumerate(rows):
            share = line.rows[row]["extra_info"]["roof_share"] * 100
            axis.barh(place + 0.38 * lane - 0.19, share, 0.36, color=COLOURS[row], label=NAMES[row])
    labels = [f"{line.case} {line.dtype} {line.direction}" for line in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=7)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.invert_yaxis()
    axis.set_xlabel("% of the roof")
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7)
    return figure


PLOTS = {"time": plot_time, "memory": plot_memory, "share-of-roof": plot_roof}


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
