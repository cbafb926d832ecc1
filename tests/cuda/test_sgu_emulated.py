"""hk.causal_sgu on the CUDA kernels, run by the emulation, against the float64 oracle.

bfloat16 takes all cases of spec.py; the other types, whose kernels differ in their products alone,
a selection. Of bfloat16, tiles have 128 rows and 128 columns, 64 x 64 of them for each warp.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from hierkernels import dispatch
from hierkernels.ops.causal_sgu import cuda as backend
from hierkernels.ops.causal_sgu import reference
from hierkernels.ops.causal_sgu.spec import CORRECTNESS, Case, dtype_name
from hierkernels.ops.causal_sgu.testing import check_accuracy, compute, make_inputs, make_standard
from hierkernels.testing import poisoned_memory

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

OTHER_TYPES = (
    "n0", "n1", "n33", "n65", "n130", "c5-h1", "c96-h4", "columns-1200", "size", "window-n5-w1",
    "window-n9-w16", "window-n75-w33", "window-n260-w128", "act-gelu-all", "act-tanh",
    "layout-halves", "layout-cbn", "layout-unaligned", "layout-broadcast",
)  # fmt: skip
_BY_NAME = {case.name: case for case in CORRECTNESS}
# Shapes that only this backend's tiles make interesting: several of rows and columns, weights in
# float32 that can be copied 16 bytes at a time (or not), sums over more items than a part has.
OWN = (
    Case("tiles", 3, 200, 96, 1, S=208),
    Case("tiles-odd-weight", 1, 150, 144, 1, S=151),
    Case("tiles-mixed", 2, 260, 80, 1, mixed=True),
    Case("tiles-mixed-odd", 2, 140, 17, 1, S=141, mixed=True),
    Case("window-tiles-mixed", 1, 450, 16, 1, window=200, mixed=True),
    Case("window-tiles-odd", 2, 400, 9, 1, window=133),
    Case("items", 40, 20, 8, 2, window=6),
)


def _parameters() -> list:
    table = [(case, BF16) for case in (*CORRECTNESS, *OWN)]
    table += [(_BY_NAME[name], dtype) for dtype in (F16, F32) for name in OTHER_TYPES]
    table += [(case, F32) for case in OWN if not case.mixed]
    return [
        pytest.param(case, dtype, id=f"causal_sgu-cuda-{dtype_name(dtype)}-{case.name}")
        for case, dtype in table
    ]


@pytest.mark.parametrize(("case", "dtype"), _parameters())
def test_accuracy(emulated_cuda: ModuleType, case: Case, dtype: torch.dtype) -> None:
    emulated_cuda.set_options(seed=zlib.crc32(case.name.encode()))
    inputs = make_inputs(case, dtype)
    with poisoned_memory():
        results = compute(inputs, "cuda")
    check_accuracy(inputs, results)


_SCHEDULED = (("tiles", BF16), ("tiles-mixed", F16), ("window-tiles-odd", F32))


@pytest.mark.parametrize(("name", "dtype"), _SCHEDULED)
def test_results_do_not_depend_on_the_schedule(
    emulated_cuda: ModuleType, name: str, dtype: torch.dtype
) -> None:
    (case,) = (case for case in OWN if case.name == name)
    inputs = make_inputs(case, dtype)
    first = compute(inputs, "cuda")
    for seed in range(2, 6):
        emulated_cuda.set_options(seed=seed)
        again = compute(inputs, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_ldmatrix_never_meets_a_bank_twice(emulated_cuda: ModuleType, dtype: torch.dtype) -> None:
    emulated_cuda.take_counts()
    compute(make_inputs(_BY_NAME["window-n75-w33"], dtype), "cuda")
    counts = emulated_cuda.take_counts()
    assert counts["ldmatrix"] > 0 and counts["bank_conflicts"] == 0


def test_what_lies_above_the_diagonal_is_not_multiplied(emulated_cuda: ModuleType) -> None:
    """A warp has 64 rows and 64 columns; 32 terms take it 64 instructions."""
    call = make_inputs(Case("triangle", 1, 256, 64, 1, S=256), BF16).call()
    counts = {}
    for name, run in (
        ("forward", lambda: backend.forward(call, True)),
        ("dgate", lambda: _backward(call, (False, True, False, False, False))),
        ("dweight", lambda: _backward(call, (False, False, True, False, False))),
    ):
        emulated_cuda.take_counts()
        run()
        counts[name] = emulated_cuda.take_counts()["mma"]
    strips = range(64, 257, 64)
    triangle = sum(rows // 32 for rows in strips) * 64
    # Of dweight: tiles of 64 x 64 on and below the diagonal, 64 channels.
    squares = len(strips) * (len(strips) + 1) // 2
    assert counts == {"forward": triangle, "dgate": triangle, "dweight": squares * 128}


def _backward(call: backend.SguCall, wanted: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
    return backend.backward(call, call.gate.clone(), call.residual.clone(), wanted)


def test_gradients_that_are_not_wanted_are_not_computed(emulated_cuda: ModuleType) -> None:
    inputs = make_inputs(Case("wanted", 1, 20, 8, 1, gate_residual=True), F32)
    _, z = backend.forward(inputs.call(), True)
    everything = backend.backward(inputs.call(), z, inputs.dout, (True,) * 5)
    for i in range(4):
        wanted = tuple(n == i for n in range(5))
        found = backend.backward(inputs.call(), z, inputs.dout, wanted)
        for n in range(4):
            assert (found[n] is None) == (n != i)
        assert torch.equal(found[i], everything[i])


def test_backward_follows_any_forward(emulated_cuda: ModuleType) -> None:
    inputs = make_inputs(Case("saved", 2, 40, 8, 2, window=16, activation="silu"), F32)
    call, standard = inputs.call(), make_standard(inputs)
    for first, second in ((reference, backend), (backend, reference)):
        out, z = first.forward(call, True)
        grads = second.backward(call, z, inputs.dout, (True,) * 5)
        results = dict(zip(inputs.differentiable(), grads, strict=False))
        standard.check({"out": out, **results})


def test_refusals(emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case("refused", 1, 5, 4, 1), torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is not one of"):
        inputs.run("cuda")
    call = inputs.to(F32).call()
    assert backend.supports(call) == []
    meta = torch.empty(1, device="meta")

    def reasons(batch: int, tokens: int, size: int) -> list[str]:
        x = meta.expand(batch, tokens, 4)
        weight = meta.expand(4, size, 2 * size)
        large = replace(call, residual=x, gate=x, weight=weight, bias=weight[..., 0], window=size)
        return backend.supports(large)

    assert any("tokens, at most" in text for text in reasons(1, 2**31, 8))
    assert any(
        "columns of the weight, at most" in text for text in reasons(1, 8, 2**30 - 2**15 + 1)
    )
    assert any("tokens of the batch, at most" in text for text in reasons(2**16, 2**15, 8))
    assert any("tiles than a launch" in text for text in reasons(1, 2**29, 1))
    odd = torch.frombuffer(bytearray(81), dtype=F32, offset=1).view(1, 5, 4)
    assert backend.supports(replace(call, gate=odd)) == ["gate is not aligned to its elements"]
    monkeypatch.undo()  # without the emulation, the CPU is not a GPU
    assert any("needs a GPU" in text for text in backend.supports(call))


def test_auto_prefers_triton_until_measured() -> None:
    order = dispatch.AUTO_ORDER["cuda"]
    assert order.index("triton") < order.index("cuda")
