"""The reference obeys the rule of chosen blocks, and the rule finds what is wrong."""

from __future__ import annotations

import pytest
import torch

from hierkernels.ops.attention.spec import ALL_DTYPES
from hierkernels.ops.select_blocks import reference
from hierkernels.ops.select_blocks.spec import CORRECTNESS, SelectCase
from hierkernels.ops.select_blocks.testing import check_selection, make_inputs, score_bounds
from hierkernels.testing import case_ids


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"select_blocks-reference-{name}")
        for name, case, dtype in case_ids(CORRECTNESS, ALL_DTYPES)
        if dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_reference(case: SelectCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    check_selection(inputs, inputs.run("reference"))


def _corruptions(indices: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """Indices of a query with more candidates than are chosen, each wrong in one way."""
    wrong = {
        name: indices.clone() for name in ("order", "twice", "future", "worst", "fewer", "beyond")
    }
    row = (0, 0, indices.shape[2] - 1)
    left = [j for j in range(scores.shape[3]) if j not in indices[row]]
    worst = min(left, key=lambda j: scores[*row, j])
    best = int(indices[row][scores[row][indices[row].long()].argmax()])
    wrong["order"][row] = indices[row].flip(0)
    wrong["twice"][*row, 1] = indices[*row, 0]
    wrong["future"][0, 0, 20, -1] = scores.shape[3] - 1
    kept = [j for j in indices[row].tolist() if j != best]
    wrong["worst"][row] = torch.tensor(sorted([*kept, worst]), dtype=torch.int32)
    wrong["fewer"][*row, -1] = -1
    wrong["beyond"][*row, -1] = scores.shape[3]
    return wrong


@pytest.mark.parametrize("scoring", ["probability", "logit"])
def test_the_rule_finds_what_is_wrong(scoring: str) -> None:
    name = "logit-select2" if scoring == "logit" else "select2"
    inputs = make_inputs(next(case for case in CORRECTNESS if case.name == name), torch.float32)
    indices = inputs.run("reference")
    scores, _ = score_bounds(inputs)
    check_selection(inputs, indices)
    for kind, wrong in _corruptions(indices, scores).items():
        with pytest.raises(AssertionError):
            check_selection(inputs, wrong)
            pytest.fail(kind)


def test_the_rule_is_strict_about_ties_and_forced_blocks() -> None:
    cases = {case.name: case for case in CORRECTNESS}
    tied = make_inputs(cases["ties"], torch.float32)
    indices = tied.run("reference")
    scores, _ = score_bounds(tied)
    row = scores[0, 0, 299]
    chosen = indices[0, 0, 299].tolist()
    last = min(chosen, key=lambda j: row[j])
    equal = [j for j in range(len(row)) if j not in chosen and row[j] == row[last]]
    assert equal, "the case has no tie at the last place"
    exchanged = sorted([*(j for j in chosen if j != last), equal[-1]])
    indices[0, 0, 299] = torch.tensor(exchanged, dtype=torch.int32)
    with pytest.raises(AssertionError, match="indices differ"):
        check_selection(tied, indices)
    forced = make_inputs(cases["forced-paper"], torch.float32)
    call = forced.call()
    call.num_local = 0
    with pytest.raises(AssertionError, match="a forced block is missing"):
        check_selection(forced, reference.forward(call))
