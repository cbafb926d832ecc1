"""How the time of an op grows with length: time(2N) / time(N) of hierkernels, against a mark.

    python -m benchmarks.scaling [SUITE ...] [--mark 2.1] [--allocator kept|default] [--json FILE]

The lengths of a suite's sweep are called in turns in one process. A large result is mapped anew by
the C library at each call, cleared page by page by the system, and on a virtual machine perhaps
fetched from its host first: time that depends on the machine's memory, not on the op. With `kept`,
malloc keeps what is freed, so that the op's own law shows; with `default` all is as users have it.
The difference is the allocator's share. Both the medians and the smallest samples of each length
are compared with those of the length before; above the mark, a ratio has a "*". Exit status 1: the
median of a doubling is above the mark.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import clock, machine
from benchmarks.measure import median
from benchmarks.suite import BACKEND_ROWS, Suite, Sweep, bind, load
from hierkernels.ops.attention.spec import SPEED_DTYPES, dtype_name
from python_models.freed_memory import keep_freed_memory

SUITES = ("local_attention", "native_sparse_attention")
MARK = 2.1
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Series:
    """The samples (seconds a call) of one row along a sweep, by length."""

    op: str
    sweep: str
    dtype: str
    direction: str
    row: str
    samples: dict[int, list[float]]

    def ratios(self, of: object = median) -> list[tuple[int, int, float]]:
        """(N, next N, time ratio for each doubling of N), of the medians or of min."""
        times = [(n, of(self.samples[n])) for n in sorted(self.samples)]  # type: ignore[operator]
        return [
            (n, more, (after / before) ** (1 / math.log2(more / n)))
            for (n, before), (more, after) in itertools.pairwise(times)
        ]

    def passes(self, mark: float, of: object = median) -> bool:
        return all(ratio <= mark for _, _, ratio in self.ratios(of))

    def lines(self, mark: float) -> Iterator[str]:
        """The table: a line for each length, and the verdict."""
        yield f"{self.op} · {self.sweep} · {self.dtype} · {self.direction} · {self.row}"
        yield f"{'N':>9}{'median ms':>12}{'ratio':>8}{'smallest ms':>14}{'ratio':>8}{'calls':>7}"
        steps = {more: ratio for _, more, ratio in self.ratios()}
        least = {more: ratio for _, more, ratio in self.ratios(min)}
        for n, samples in sorted(self.samples.items()):
            cells = f"{n:9}{median(samples) * 1e3:12.3f}{_cell(steps.get(n), mark)}"
            cells += f"{min(samples) * 1e3:14.3f}{_cell(least.get(n), mark)}{len(samples):7}"
            yield cells
        verdicts = ((self.passes(mark), "medians"), (self.passes(mark, min), "smallest"))
        yield "  ".join(f"{'PASS' if ok else 'FAIL'} ({what})" for ok, what in verdicts)


def _cell(ratio: float | None, mark: float) -> str:
    return f"{'':8}" if ratio is None else f"{ratio:7.2f}{'*' if ratio > mark else ' '}"


def measure(
    suite: Suite, sweep: Sweep, dtype: torch.dtype, direction: str, device: str,
    lengths: range, seconds: float,
) -> Series:  # fmt: skip
    """One series of the device's best backend."""
    row = BACKEND_ROWS[device][0]
    cases = {n: next(c for c in suite.cases if c.name == name) for name, n in sweep.sizes.items()}
    runs: dict[int, clock.Run] = {}
    for n, case in sorted(cases.items()):
        if n in lengths and dtype in case.dtypes:
            inputs = suite.inputs(case, dtype, device)
            runs[n] = bind(next(iter(suite.candidates(row, inputs, direction))), direction)
    samples = in_turns(clock.make_clock(device), runs, seconds)
    return Series(suite.name, sweep.name, dtype_name(dtype), direction, row, samples)


def in_turns(
    ticks: clock.Clock, runs: dict[int, clock.Run], seconds: float
) -> dict[int, list[float]]:
    """As many samples of each length, for so long, after a few calls that do not count."""
    loops = {n: clock.loops_for(clock.quickest(ticks, run)) for n, run in runs.items()}
    samples: dict[int, list[float]] = {n: [] for n in runs}
    gc.disable()
    start, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - start < seconds:
        rounds += 1
        for n, run in runs.items():
            samples[n].append(ticks.sample(run, loops[n]))
    gc.enable()
    return samples


def series(options: argparse.Namespace) -> Iterator[Series]:
    """All that was asked for, one after another."""
    lengths = range(options.shortest, options.longest + 1)
    for suite in map(load, options.suites or SUITES):
        for sweep in (sweep for sweep in suite.sweeps if sweep.axis == "N"):
            known = {dtype for case in suite.cases for dtype in case.dtypes}
            for dtype in (dtype for dtype in SPEED_DTYPES if dtype in known):
                for direction in suite.directions:
                    wanted = options.dtype in (None, dtype_name(dtype))
                    if wanted and options.direction in (None, direction):
                        yield measure(
                            suite, sweep, dtype, direction, options.device, lengths, options.seconds
                        )
                        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("suites", nargs="*", help=f"default: {' '.join(SUITES)}")
    parser.add_argument("--mark", type=float, default=MARK, help=f"default: {MARK}")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept")
    parser.add_argument("--dtype", choices=[dtype_name(dtype) for dtype in SPEED_DTYPES])
    parser.add_argument("--direction", choices=("forward", "backward"))
    parser.add_argument("--shortest", type=int, default=1, help="least N")
    parser.add_argument("--longest", type=int, default=2**17, help="largest N")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each series")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write or extend this file")
    options = parser.parse_args()
    if options.device == "cpu" and options.allocator == "kept" and not keep_freed_memory():
        parser.error("this system's malloc cannot keep freed memory: use --allocator default")
    print(f"allocator: {options.allocator}; mark: {options.mark}")
    failed = False
    for one in series(options):
        print("\n".join(one.lines(options.mark)), flush=True)
        failed |= not one.passes(options.mark)
        if options.json:
            save(options.json, one, options)
    sys.exit(int(failed))


def save(path: Path, one: Series, options: argparse.Namespace) -> None:
    """Adds a series, with the allocator and the mark, in the place of one of the same name."""
    data = json.loads(path.read_text()) if path.exists() else {"series": []}
    data |= {
        "machine_info": machine.machine_info(options.device),
        "commit_info": machine.commit_info(),
    }
    record = {"allocator": options.allocator, "mark": options.mark, **asdict(one)}
    key = ("allocator", "op", "sweep", "dtype", "direction", "row")
    data["series"] = [
        old for old in data["series"] if any(old[name] != record[name] for name in key)
    ] + [record]
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
