"""Times one revision's kernels on request; benchmarks.compare runs one such process a revision.

Each line of input is a request in JSON, each line of output the answer:
    {"op": suite, "case": name, "dtype": name, "direction": "forward"}
        -> {"loops": n} or {"skip": reason}
    {"loops": n} -> {"seconds": seconds a call}
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks import clock
from benchmarks.suite import BACKEND_ROWS, Candidate, Problem, Suite, Unsupported, load

Prepared = tuple[Suite, Problem]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timer = clock.make_clock(device)
    run: clock.Run | None = None
    prepared: tuple[tuple[str, ...], Prepared] | None = None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "case" in request:
            run = None
            key = (request["op"], request["case"], request["dtype"])
            try:
                if prepared is None or prepared[0] != key:
                    prepared = None  # frees the old one first
                    prepared = key, _prepare(*key, device)
                suite, problem = prepared[1]
                candidate = _ours(suite, problem, device, request["direction"])
                problem.check(candidate, request["direction"])
            except (Unsupported, AssertionError) as error:
                answer: dict[str, Any] = {"skip": str(error)}
            else:
                run = timer.prepare(problem.bind(candidate, request["direction"]))
                answer = {"loops": clock.loops_for(clock.quickest(timer, run))}
        else:
            assert run is not None, "a case comes first"
            answer = {"seconds": timer.sample(run, request["loops"])}
        print(json.dumps(answer), flush=True)


def _prepare(op: str, name: str, dtype: str, device: str) -> Prepared:
    """A suite and the problem of one of its cases. Raises Unsupported."""
    try:
        suite = load(op)
    except ImportError as error:
        raise Unsupported(f"this revision has no {op}: {error}") from error
    case = next(case for case in suite.cases if case.name == name)
    return suite, suite.problem(case, getattr(torch, dtype), device)


def _ours(suite: Suite, problem: Problem, device: str, direction: str) -> Candidate:
    """The first of hierkernels' backends that computes the case. Raises Unsupported."""
    reasons = []
    for row in BACKEND_ROWS[device]:
        try:
            return next(iter(suite.candidates(row, problem.inputs, direction)))
        except Unsupported as error:
            reasons.append(str(error))
    raise Unsupported("; ".join(reasons))


if __name__ == "__main__":
    main()
