"""The command that prints each stage's share of its limit, on a small case."""

from __future__ import annotations

import pytest
import torch

from benchmarks import stages
from benchmarks.clock import make_clock
from benchmarks.roof import Roof
from hierkernels.ops.native_sparse_attention.spec import CORRECTNESS
from hierkernels.ops.native_sparse_attention.testing import make_inputs

CASES = {case.name: case for case in CORRECTNESS}


@pytest.mark.parametrize("direction", stages.DIRECTIONS)
@pytest.mark.parametrize("name", ["paper-n65", "seed-n65"])
def test_lines(name: str, direction: str) -> None:
    inputs = make_inputs(CASES[name], torch.float32)
    work = CASES[name].stages(torch.float32, direction)
    roof = Roof({"float32": 1e11}, {2**20: 1e10})
    found = list(stages.lines(inputs, "reference", direction, roof, make_clock("cpu")))
    *each, total = found
    assert [line[0] for line in each] == list(work)
    for stage, flops, nbytes, seconds, share in each:
        assert (flops, nbytes) == (work[stage].flops, work[stage].bytes)
        least = max(flops / 1e11, nbytes / 1e10)
        assert seconds > 0 and share == pytest.approx(least / seconds)
    assert total[0] == "all" and total[1] == CASES[name].flops(direction)
    assert total[3] == pytest.approx(sum(line[3] for line in each))
