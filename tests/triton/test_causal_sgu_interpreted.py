"""hk.causal_sgu on the Triton backend, interpreted on the CPU, against the float64 oracle.

Lengths are small because a tile takes the interpreter about 10 ms; its tiles are small too, so that
every case still has tiles above, on and below the diagonal.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.causal_sgu import reference
from hierkernels.ops.causal_sgu import triton as backend
from hierkernels.ops.causal_sgu.call import ACTIVATIONS
from hierkernels.ops.causal_sgu.spec import Case, dtype_name
from hierkernels.ops.causal_sgu.testing import check_accuracy, compute, make_inputs, make_standard
from hierkernels.testing import poisoned_memory

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

TABLE = (
    (Case("n1", 2, 1, 8, 2), F32),
    (Case("n31", 2, 31, 24, 2), F32),
    (Case("n32-bf16", 1, 32, 16, 1), BF16),
    (Case("n65", 2, 65, 40, 2), F32),
    (Case("n70-bf16", 2, 70, 34, 2), BF16),
    (Case("n70-f16", 2, 70, 20, 1), F16),
    (Case("mixed-bf16", 2, 70, 34, 2, mixed=True, gate_residual=True), BF16),
    (Case("mixed-f16", 1, 40, 16, 2, mixed=True), F16),
    (Case("size", 2, 45, 24, 3, S=100), F32),
    (Case("heads-of-1", 3, 20, 3, 3), F32),
    (Case("no-tokens", 2, 0, 8, 2, S=5), F32),
    (Case("no-batch", 0, 9, 8, 2), F32),
    (Case("window-1", 2, 5, 8, 2, window=1), F32),
    (Case("window-wider", 2, 9, 24, 2, window=16), F32),
    (Case("window-whole", 2, 32, 24, 2, window=16), F32),
    (Case("window-cut", 2, 100, 24, 2, window=33, gate_residual=True), F32),
    (Case("window-cut-bf16", 2, 90, 24, 2, window=40, mixed=True), BF16),
    (Case("window-many", 1, 150, 16, 1, window=7), F32),
    *(
        (Case(f"act-{name}", 1, 40, 20, 1, activation=name, gate_residual=True, mixed=True), dtype)
        for name, dtype in zip(ACTIVATIONS[1:], (BF16, F32, BF16, F32, F32), strict=True)
    ),
    *(
        (Case(f"layout-{name}", 2, 37, 18, 2, layout=name, gate_residual=True), F32)
        for name in ("halves", "cbn", "unaligned", "broadcast")
    ),
)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"causal_sgu-triton-{dtype_name(dtype)}-{case.name}")
        for case, dtype in TABLE
    ],
)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        results = compute(inputs, "triton")
    check_accuracy(inputs, results)


def test_backward_follows_any_forward() -> None:
    inputs = make_inputs(Case("saved", 2, 40, 8, 2, window=16, activation="silu"), F32)
    call, standard = inputs.call(), make_standard(inputs)
    for first, second in ((reference, backend), (backend, reference)):
        out, z = first.forward(call, True)
        grads = second.backward(call, z, inputs.dout, (True,) * 5)
        results = dict(zip(inputs.differentiable(), grads, strict=False))
        standard.check({"out": out, **results})


def test_results_are_bitwise_repeatable() -> None:
    for window in (None, 7):  # the windowed weight's gradient is summed in splits
        inputs = make_inputs(Case("repeat", 3, 60, 16, 2, window=window), F32)
        first, second = compute(inputs, "triton"), compute(inputs, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case("refused", 1, 5, 4, 1), torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is not one of"):
        inputs.run("triton")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    call = replace(inputs.to(F32).call())
    assert [text for text in backend.supports(call) if "needs a GPU" in text]
