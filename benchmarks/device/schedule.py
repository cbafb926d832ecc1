"""In what order groups are measured, how long each may take, and what happens if one crashes."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.device.cases import Entry

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0  # a worker may take so long to start and to measure its roof
GRACE, LEAST_S = 3.0, 30.0  # a group that takes so many times its estimate, and so long, is ended


class WorkerFailed(Exception):
    """The worker ended, or gave no answer in time. It has to be started anew."""


class NoWorker(Exception):
    """None can be started: there is no GPU, or it is of no use any more."""


class Answers(Protocol):
    """What measures groups: benchmarks.device.worker in a process, or a test's stand-in."""

    hello: dict[str, Any]

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Process:
    """A worker in a process of its own. Raises WorkerFailed."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "benchmarks.device.worker", *options]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.hello = self._next(START_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")  # the end

    def _next(self, timeout: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise WorkerFailed(f"no answer in {timeout:.0f} s") from None
        if not line:
            self.process.wait()
            raise WorkerFailed(f"the process ended with status {self.process.returncode}")
        return json.loads(line)

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except OSError as error:
            raise WorkerFailed(str(error)) from error
        return self._next(timeout)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Budget:
    """Seconds of a run. What groups took beyond their estimates is expected of the next, too."""

    total: float
    clock: Callable[[], float] = time.monotonic
    estimated: float = 0.0
    taken: float = 0.0
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        return self.start + self.total - self.clock()

    @property
    def slowness(self) -> float:
        """Time over estimates so far, at least 1."""
        return max(1.0, self.taken / self.estimated) if self.estimated else 1.0

    def allows(self, seconds: float) -> bool:
        return seconds * self.slowness <= self.left

    def spent(self, estimate: float, seconds: float) -> None:
        self.estimated += estimate
        self.taken += seconds


@dataclass
class Outcome:
    """Of a run. The reasons are by "entry direction row", those of left_out by entry."""

    machine_info: dict[str, Any] = field(default_factory=dict)
    roof: dict[str, dict[str, float]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def raise_roof(self, found: dict[str, dict[str, float]]) -> None:
        """The best rates of all workers."""
        for kind, rates in found.items():
            own = self.roof.setdefault(kind, {})
            for name, rate in rates.items():
                own[str(name)] = max(own.get(str(name), 0.0), rate)


class Run:
    """Measures entries with workers that `start` starts, as far as the budget goes."""

    def __init__(
        self,
        start: Callable[[], Answers],
        budget: Budget,
        seconds: float,
        say: Callable[[str], None],
        save: Callable[[Outcome], None],
    ) -> None:
        self.start, self.budget, self.seconds, self.say, self.save = (
            start, budget, seconds, say, save,
        )  # fmt: skip
        self.worker: Answers | None = None
        self.outcome = Outcome()

    def run(self, entries: Iterable[Entry]) -> Outcome:
        """Every entry for which there is time; an entry too long may be followed by a short one."""
        try:
            for entry in entries:
                for direction in entry.directions:
                    estimate = entry.seconds / len(entry.directions)
                    if self.budget.allows(estimate):
                        self._measure(entry, direction, estimate)
                        self.save(self.outcome)
                    else:
                        self.outcome.left_out.append(f"{entry.name} {direction}")
        finally:
            if self.worker is not None:
                self.worker.close()
        return self.outcome

    def _measure(self, entry: Entry, direction: str, estimate: float) -> None:
        """A group. If it crashes, again without our CUDA kernels, and then without anything."""
        rows = list(entry.rows)
        begin = self.budget.clock()
        while rows:
            try:
                answer = self._ask(entry, direction, rows, estimate)
            except WorkerFailed as error:
                self.worker = None
                suspects = ["cuda"] if "cuda" in rows else rows
                for row in suspects:
                    self.outcome.failed[f"{entry.name} {direction} {row}"] = str(error)
                self.say(f"{entry.name} {direction}: {error} (rows {', '.join(suspects)})")
                rows = [row for row in rows if row not in suspects]
                continue
            self._keep(entry, direction, answer)
            break
        self.budget.spent(estimate, self.budget.clock() - begin)

    def _ask(
        self, entry: Entry, direction: str, rows: list[str], estimate: float
    ) -> dict[str, Any]:
        if self.worker is None:
            try:
                self.worker = self.start()
            except WorkerFailed as error:
                raise NoWorker(str(error)) from error
            self.outcome.machine_info = self.worker.hello["machine_info"]
            self.outcome.raise_roof(self.worker.hello["roof"])
        request = {"entry": entry.name, "direction": direction, "rows": rows}
        timeout = max(LEAST_S, GRACE * estimate * self.budget.slowness)
        return self.worker.ask(request | {"seconds": self.seconds}, timeout)

    def _keep(self, entry: Entry, direction: str, answer: dict[str, Any]) -> None:
        outcome = self.outcome
        outcome.records += answer["records"]
        outcome.raise_roof(answer["roof"])
        for kind in ("skipped", "failed"):
            for row, reason in answer[kind].items():
                getattr(outcome, kind)[f"{entry.name} {direction} {row}"] = reason
        times = [
            f"{r['extra_info']['row']} {r['stats']['median'] * 1e3:.3g} ms"
            for r in answer["records"]
        ]
        times += [f"{row} {kind}" for kind in ("skipped", "failed") for row in answer[kind]]
        self.say(f"[{self.budget.left:4.0f} s left] {entry.name} {direction}: {', '.join(times)}")
