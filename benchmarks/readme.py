"""Writes the measured tables and plots of README.md from committed results.

python -m benchmarks.readme

A table stands between two comments, the first of which names the op and the result file. A plot
follows a comment that names it, as in a report, and the result file:

    <!-- plotted: local_attention-time in benchmarks/results/FILE.json -->
    ![Local attention against length](docs/images/local_attention-time.svg)
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import plots, report
from benchmarks.table import Line, collect

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
_PLACE = re.compile(
    r"(<!-- measured: (\S+) in (\S+) -->\n).*?(<!-- end of measured -->)", re.DOTALL
)
_PLOT = re.compile(r"<!-- plotted: (\S+) in (\S+) -->\n!\[[^\]]*\]\((\S+)\)")
_DTYPES = ("float32", "bfloat16")

# By op: the title, the peer, the groups of cases (none: all).
_TABLES = {
    "attention": (
        "causal `hk.attention` against `F.scaled_dot_product_attention`; (B, H, N, D)",
        "sdpa",
        ("long", "short"),
    ),
    "local_attention": (
        "`hk.local_attention`, exact causal windows, against local-attention; (B, H, N, D)",
        "package",
        (),
    ),
    "causal_sgu": (
        "`hk.causal_sgu`, 4 heads, against masked einsum; (B, N, C)",
        "eager",
        ("global", "windowed"),
    ),
    "native_sparse_attention": (
        "layer of native sparse attention against native-sparse-attention-pytorch; tokens",
        "package",
        (),
    ),
    "training_step": ("a training step against the original package; bytes", "package", ()),
}


def updated(text: str) -> str:
    """The README with tables as their result files have them. Raises ValueError if it has none."""

    def replacement(place: re.Match[str]) -> str:
        title, peer, groups = _TABLES[place[2]]
        lines = [line for line in collect(report.load(ROOT / place[3])) if line.op == place[2]]
        if groups:
            lines = [line for line in lines if line.case_group in groups]
        return place[1] + "\n" + "\n".join(_table(title, lines, peer)) + "\n\n" + place[4]

    text, places = _PLACE.subn(replacement, text)
    if not places:
        raise ValueError("README.md has no '<!-- measured: OP in FILE -->'")
    return text


def _name(case: str) -> str:
    """window-1x16384x1024-w128 as (1, 16384, 1024) w128; a name without sizes as it is."""
    found = re.search(r"(\d+(?:x\d+){2,})(.*)", case)
    if not found:
        return case.replace("-", " ")
    return f"({', '.join(found[1].split('x'))}){found[2].replace('-', ' ')}"


def _table(title: str, lines: list[Line], peer: str) -> Iterator[str]:
    """A row a case, a column for each dtype and pass."""
    passes = list(dict.fromkeys(line.direction for line in lines))
    cases: dict[str, dict[tuple[str, str], str]] = {}
    for line in lines:
        ratio = line.ratio(peer)
        if line.ours is None or ratio is None:
            continue
        share = line.rows[line.ours]["extra_info"]["roof_share"]
        cell = f"{ratio:.2f}x ({share:.0%})"
        cases.setdefault(_name(line.case), {})[line.dtype, line.direction] = cell
    measured = {column for cells in cases.values() for column in cells}
    columns = [(dtype, way) for dtype in _DTYPES for way in passes if (dtype, way) in measured]
    yield f"| {title} | " + " | ".join(" ".join(column) for column in columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for case in _by_length(cases):
        cells = cases[case]
        yield f"| {case} | " + " | ".join(cells.get(column, "") for column in columns) + " |"


def _by_length(cases: Iterable[str]) -> list[str]:
    """layer 1024 before layer 4096; what has another name, or shape, stays in its order."""
    kinds = {case: case if "(" in case else re.sub(r"\d+", "#", case) for case in cases}
    order = list(dict.fromkeys(kinds.values()))

    def key(case: str) -> tuple[int, list[int]]:
        return order.index(kinds[case]), [int(number) for number in re.findall(r"\d+", case)]

    return sorted(kinds, key=key)


def plots_of(text: str) -> list[tuple[str, Path, Path]]:
    """The name, result file and image of each plot that the README has."""
    return [(m[1], ROOT / m[2], ROOT / m[3]) for m in _PLOT.finditer(text)]


def main() -> None:
    text = README.read_text()
    README.write_text(updated(text))
    for name, result, image in plots_of(text):
        with tempfile.TemporaryDirectory() as folder:
            if name not in plots.draw_all(report.load(result), Path(folder)):
                raise ValueError(f"{result.name} has no plot {name}")
            shutil.copyfile(Path(folder) / f"{name}.svg", image)


if __name__ == "__main__":
    main()
