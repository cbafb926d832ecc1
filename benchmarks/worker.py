"""Times one revision's kernels on request; benchmarks.compare runs one such process a revision.

Each line of input is a request in JSON, each line of output the answer:
    {"case": name, "dtype": name, "direction": "forward"} -> {"loops": n} or {"skip": reason}
    {"loops": n} -> {"seconds": seconds a call}
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from benchmarks import clock
from benchmarks.measure import Problem, bind
from benchmarks.rows import BACKEND_ROWS, Candidate, Unsupported, candidates
from hierkernels.ops.attention.spec import SPEED


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timer = clock.make_clock(device)
    cases = {case.name: case for case in SPEED}
    run: clock.Run | None = None
    problem: tuple[tuple[str, str], Problem] | None = None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "case" in request:
            run = None
            key = (request["case"], request["dtype"])
            if problem is None or problem[0] != key:
                problem = None  # frees the old one first
                problem = key, Problem.make(cases[key[0]], getattr(torch, key[1]), device)
            try:
                candidate = _ours(problem[1], device, request["direction"])
                problem[1].check(candidate, request["direction"])
            except (Unsupported, AssertionError) as error:
                answer: dict[str, Any] = {"skip": str(error)}
            else:
                run = timer.prepare(bind(candidate, request["direction"]))
                answer = {"loops": clock.loops_for(clock.quickest(timer, run))}
        else:
            assert run is not None, "a case comes first"
            answer = {"seconds": timer.sample(run, request["loops"])}
        print(json.dumps(answer), flush=True)


def _ours(problem: Problem, device: str, direction: str) -> Candidate:
    """The first of hierkernels' backends that computes the case. Raises Unsupported."""
    reasons = []
    for row in BACKEND_ROWS[device]:
        try:
            return next(iter(candidates(row, problem.inputs, direction)))
        except Unsupported as error:
            reasons.append(str(error))
    raise Unsupported("; ".join(reasons))


if __name__ == "__main__":
    main()
