"""One line a group: hierkernels' time, its share of the roof, and every peer's time over it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import suite
from benchmarks.suite import Sweep

HIERKERNELS_ROWS = ("cuda", "triton", "cpu")
FIRST_OP = "attention"  # of results from before there were others, which name none


@dataclass(frozen=True)
class Line:
    """A group's rows, by name: pytest-benchmark's records of them."""

    op: str
    case_group: str
    case: str
    dtype: str
    direction: str
    rows: dict[str, dict[str, Any]]

    @property
    def ours(self) -> str | None:
        """The quickest row of hierkernels; None if no backend ran."""
        ran = [row for row in HIERKERNELS_ROWS if row in self.rows]
        return min(ran, key=self.seconds, default=None)

    def seconds(self, row: str) -> float:
        """The median time of a call."""
        return self.rows[row]["stats"]["median"]

    def ratio(self, row: str) -> float | None:
        """The row's time over hierkernels'; above 1 = hierkernels is faster."""
        if self.ours is None or row not in self.rows:
            return None
        return self.seconds(row) / self.seconds(self.ours)


def collect(data: dict[str, Any]) -> list[Line]:
    """The lines of a result, in the order they were measured; memory is not among them."""
    lines: dict[tuple[str, ...], Line] = {}
    for record in data["benchmarks"]:
        info = record["extra_info"]
        if info.get("case_group") in (None, "memory"):
            continue
        key = (_op(info), info["case_group"], info["case"], info["dtype"], info["direction"])
        lines.setdefault(key, Line(*key, {})).rows[info["row"]] = record
    return list(lines.values())


def _op(info: dict[str, Any]) -> str:
    return info.get("op", FIRST_OP)


def ops(data: dict[str, Any]) -> list[str]:
    """The ops of a result, in the order they were measured."""
    return list(dict.fromkeys(_op(record["extra_info"]) for record in data["benchmarks"]))


def peers(lines: list[Line]) -> list[str]:
    """The rows besides hierkernels' of one op's lines, in the order of its suite."""
    found = {row for line in lines for row in line.rows} - set(HIERKERNELS_ROWS)
    known = [row for line in lines[:1] for row in _known_peers(line.op) if row in found]
    return [*known, *sorted(found.difference(known))]


def _known_peers(op: str) -> list[str]:
    return list(suite.load(op).peers) if op in suite.names() else []


def memory_peaks(data: dict[str, Any], op: str) -> dict[str, dict[int, int]]:
    """Peak extra bytes by row and length of an op."""
    peaks: dict[str, dict[int, int]] = {}
    for record in data["benchmarks"]:
        info = record["extra_info"]
        if info.get("case_group") == "memory" and _op(info) == op:
            peaks.setdefault(info["row"], {})[info["n"]] = info["peak_extra_bytes"]
    return peaks


def lines(data: dict[str, Any]) -> Iterator[str]:
    """The terminal table: a part for each op, with its own peers."""
    measured = collect(data)
    width = max((len(line.case) for line in measured), default=0)
    for op in ops(data):
        own = [line for line in measured if line.op == op]
        if own:
            yield from _part(op, own, width)
        peaks = memory_peaks(data, op)
        for n in sorted({n for by_length in peaks.values() for n in by_length}):
            found = ", ".join(
                f"{row} {peaks[row][n] / 2**20:.1f} MiB" for row in peaks if n in peaks[row]
            )
            yield f"{op}: peak extra memory, forward and backward, N = {n}: {found}"
        yield from _growths(op, own)
    yield "x: the peer's time over hierkernels' (where no backend of it ran, the peer's ms)"


def _part(op: str, lines: list[Line], width: int) -> Iterator[str]:
    columns = peers(lines)
    header = "".join(f"{peer + ' x':>12}" for peer in columns)
    yield f"{op:{width}}  dtype     pass      backend         ms   roof{header}"
    for line in lines:
        ours = line.ours
        own = f"{'-':8}{'-':>10}{'-':>7}"
        if ours:
            share = line.rows[ours]["extra_info"]["roof_share"]
            own = f"{ours:8}{line.seconds(ours) * 1e3:10.4g}{share:7.0%}"
        cells = "".join(f"{_peer(line, peer):>12}" for peer in columns)
        yield f"{line.case:{width}}  {line.dtype:9} {line.direction:9} {own}{cells}"


def growth(lines: list[Line], sweep: Sweep, row: str) -> list[tuple[int, int, float]]:
    """(n, next n, time ratio for each doubling of n) of one row along a sweep."""
    times = sorted(
        (sweep.sizes[line.case], line.seconds(row)) for line in lines if row in line.rows
    )
    return [
        (n, more, (after / before) ** (1 / math.log2(more / n)))
        for (n, before), (more, after) in itertools.pairwise(times)
    ]


def _growths(op: str, lines: list[Line]) -> Iterator[str]:
    """time(2 N) / time(N) of hierkernels along the sweeps over length."""
    for sweep in suite.load(op).sweeps if op in suite.names() else ():
        columns: dict[tuple[str, str], list[Line]] = {}
        for line in lines:
            if sweep.axis == "N" and line.case in sweep.sizes:
                columns.setdefault((line.dtype, line.direction), []).append(line)
        for (dtype, direction), own in columns.items():
            for row in HIERKERNELS_ROWS:
                if steps := growth(own, sweep, row):
                    found = ", ".join(f"{n} -> {more} {ratio:.2f}" for n, more, ratio in steps)
                    what = f"{op}: {sweep.name}, {dtype} {direction}, {row}"
                    yield f"{what}: time(2N)/time(N): {found}"


def _peer(line: Line, peer: str) -> str:
    if peer not in line.rows:
        return "-"
    ratio = line.ratio(peer)
    return f"{line.seconds(peer) * 1e3:.4g} ms" if ratio is None else f"{ratio:.2f}"
