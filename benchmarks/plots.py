"""SVG plots of a result: time and memory against a size, peak memory, share of the roof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import suite
from benchmarks.suite import Suite, Sweep
from benchmarks.table import HIERKERNELS_ROWS, Line, collect, memory_peaks, ops, peers

COLOURS = {
    "cpu": "#d1495b", "cuda": "#d1495b", "triton": "#edae49", "eager": "#8d99ae",
    "sdpa": "#00798c", "compiled": "#30638e", "flex": "#6a994e", "package": "#7b2d8b",
}  # fmt: skip
OTHER_COLOUR = "#444444"  # of a peer that has none

Points = list[tuple[int, float]]


def row_name(op: str, row: str) -> str:
    """What a row is called in plots and headings."""
    if row in HIERKERNELS_ROWS:
        return f"hierkernels {row}"
    return suite.load(op).peers.get(row, row) if op in suite.names() else row


def draw_all(data: dict[str, Any], out: Path) -> list[str]:
    """Saves every plot that the data has something to show in; returns their names."""
    names = []
    with plt.rc_context({"svg.hashsalt": "hierkernels", "font.size": 9, "axes.grid": True}):
        for name, figure in figures(data):
            # The same bytes for the same data.
            figure.savefig(out / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            names.append(name)
    return names


def figures(data: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Every plot that the data has something to show in, by name."""
    for op in ops(data):
        if op not in suite.names():
            continue
        own = [line for line in collect(data) if line.op == op]
        measured = suite.load(op)
        for sweep in measured.sweeps:
            if figure := plot_sweep(own, sweep):
                yield f"{op}-{sweep.name}", figure
        if figure := plot_memory(op, memory_peaks(data, op)):
            yield f"{op}-memory", figure
        if figure := plot_roof(own, measured):
            yield f"{op}-roof", figure


def plot_sweep(lines: list[Line], sweep: Sweep) -> Figure | None:
    """Time (above) and peak extra memory of a call (below); a column a dtype and direction.

    Both axes are logarithmic: the dotted line grows with the size, the dashed with its square.
    """
    columns: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.case in sweep.sizes:
            columns.setdefault((line.dtype, line.direction), []).append(line)
    if not columns or len({line.case for own in columns.values() for line in own}) < 2:
        return None
    size = (3.2 * len(columns), 5.2)
    figure, axes = plt.subplots(2, len(columns), figsize=size, squeeze=False, sharex=True)
    rows = [*HIERKERNELS_ROWS, *peers(lines)]
    every = sorted({sweep.sizes[line.case] for own in columns.values() for line in own})
    for column, ((dtype, direction), own) in enumerate(columns.items()):
        times: dict[str, Points] = {row: [] for row in rows}
        sizes: dict[str, Points] = {row: [] for row in rows}
        for line in own:
            for row, record in line.rows.items():
                n, extra = sweep.sizes[line.case], record["extra_info"]["peak_extra_bytes"]
                times[row].append((n, line.seconds(row) * 1e3))
                if extra is not None:
                    sizes[row].append((n, max(extra, 2**16) / 2**20))
        _curves(axes[0][column], own[0].op, times, every, guides=sweep.axis == "N")
        _curves(axes[1][column], own[0].op, sizes, every)
        axes[0][column].set(title=f"{dtype} {direction}")
        axes[1][column].set(xlabel=sweep.axis)
    axes[0][0].set_ylabel("ms")
    axes[1][0].set_ylabel("MiB beyond inputs and outputs")
    handles = {
        name: handle
        for axis in axes[0]
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0][-1].legend(
        handles.values(), handles.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.suptitle(sweep.title)
    figure.tight_layout()
    return figure


def _curves(
    axis: Axes, op: str, rows: dict[str, Points], every: list[int], guides: bool = False
) -> None:
    """A curve for each row that has points; `every` are the ticks."""
    for row, points in rows.items():
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            colour = COLOURS.get(row, OTHER_COLOUR)
            axis.plot(xs, ys, "o-", ms=3, color=colour, label=row_name(op, row))
    if guides and len(every) > 1:
        lowest = min(y for points in rows.values() for _, y in points)
        for power, style, name in ((1, ":", "grows with N"), (2, "--", "grows with N²")):
            ys = [0.5 * lowest * (n / every[0]) ** power for n in every]
            axis.plot(every, ys, style, lw=0.8, color="#aaaaaa", label=name)
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(every, [str(n) for n in every], rotation=45)
    axis.minorticks_off()


def plot_memory(op: str, peaks: dict[str, dict[int, int]]) -> Figure | None:
    """Peak extra memory of a forward and backward against length."""
    if not peaks:
        return None
    figure, axis = plt.subplots(figsize=(4.5, 3))
    sizes = {
        row: [(n, max(found, 2**12) / 2**20) for n, found in by_length.items()]
        for row, by_length in peaks.items()
    }
    _curves(axis, op, sizes, sorted({n for by_length in peaks.values() for n in by_length}))
    axis.set(xlabel="N", ylabel="MiB beyond inputs and outputs")
    axis.legend(fontsize=7)
    axis.set_title("Peak memory, forward and backward, float32")
    return figure


def plot_roof(lines: list[Line], measured: Suite) -> Figure | None:
    """Share of the roof of hierkernels and of the suite's yardstick, a bar for each group."""
    if measured.charted:
        lines = [line for line in lines if line.case_group in measured.charted]
    lines = [line for line in lines if line.ours or measured.yardstick in line.rows]
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=(7, 0.22 * len(lines) + 1))
    for place, line in enumerate(lines):
        rows = [row for row in (line.ours, measured.yardstick) if row in line.rows]
        for lane, row in enumerate(rows):
            share = line.rows[row]["extra_info"]["roof_share"] * 100
            colour, name = COLOURS.get(row, OTHER_COLOUR), row_name(line.op, row)
            axis.barh(place + 0.38 * lane - 0.19, share, 0.36, color=colour, label=name)
    labels = [f"{line.case} {line.dtype} {line.direction}" for line in lines]
    axis.set_yticks(range(len(lines)), labels, fontsize=7)
    axis.set_ylim(-0.6, len(lines) - 0.4)
    axis.invert_yaxis()
    axis.set_xlabel("% of the roof")
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7)
    return figure
