"""One line a group: hierkernels' time, its share of the roof, and every peer's time over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import PEER_ROWS

HIERKERNELS_ROWS = ("cuda", "triton", "cpu")


@dataclass(frozen=True)
class Line:
    """A group's rows, by name: pytest-benchmark's records of them."""

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
        key = (info["case_group"], info["case"], info["dtype"], info["direction"])
        lines.setdefault(key, Line(*key, {})).rows[info["row"]] = record
    return list(lines.values())


def memory_peaks(data: dict[str, Any]) -> dict[str, dict[int, int]]:
    """Peak extra bytes by row and length."""
    peaks: dict[str, dict[int, int]] = {}
    for record in data["benchmarks"]:
        info = record["extra_info"]
        if info.get("case_group") == "memory":
            peaks.setdefault(info["row"], {})[info["n"]] = info["peak_extra_bytes"]
    return peaks


def lines(data: dict[str, Any]) -> Iterator[str]:
    """The terminal table."""
    case_width = max((len(line.case) for line in collect(data)), default=0)
    peers = "".join(f"{peer + ' x':>11}" for peer in PEER_ROWS)
    yield f"{'case':{case_width}}  dtype     pass      backend         ms   roof{peers}"
    for line in collect(data):
        ours = line.ours
        own = f"{'-':8}{'-':>10}{'-':>7}"
        if ours:
            share = line.rows[ours]["extra_info"]["roof_share"]
            own = f"{ours:8}{line.seconds(ours) * 1e3:10.4g}{share:7.0%}"
        peers = "".join(f"{_peer(line, peer):>11}" for peer in PEER_ROWS)
        yield f"{line.case:{case_width}}  {line.dtype:9} {line.direction:9} {own}{peers}"
    yield "x: the peer's time over hierkernels' (where no backend of it ran, the peer's ms)"
    peaks = memory_peaks(data)
    for n in sorted({n for by_length in peaks.values() for n in by_length}):
        found = ", ".join(
            f"{row} {peaks[row][n] / 2**20:.1f} MiB" for row in peaks if n in peaks[row]
        )
        yield f"peak extra memory, forward and backward, N = {n}: {found}"


def _peer(line: Line, peer: str) -> str:
    if peer not in line.rows:
        return "-"
    ratio = line.ratio(peer)
    return f"{line.seconds(peer) * 1e3:.4g} ms" if ratio is None else f"{ratio:.2f}"
