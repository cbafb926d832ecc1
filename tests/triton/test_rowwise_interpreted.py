"""Norms, hk.gelu and hk.rotary on the Triton backend, interpreted, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.gelu import spec as gelus
from hierkernels.ops.gelu import testing as gelu_testing
from hierkernels.ops.rms_norm import reference as norm_reference
from hierkernels.ops.rms_norm import spec as norms
from hierkernels.ops.rms_norm import testing as norm_testing
from hierkernels.ops.rms_norm import triton as norm_backend
from hierkernels.ops.rotary import spec as rotations
from hierkernels.ops.rotary import testing as rotary_testing
from hierkernels.ops.rotary import triton as rotary_backend
from hierkernels.ops.rotary.api import make_call
from hierkernels.testing import case_ids, poisoned_memory

F32, HALVES = torch.float32, (torch.bfloat16, torch.float16)
_TABLE = [
    pytest.param(testing, case, dtype, id=f"{op}-triton-{name}")
    for op, testing, cases in (
        ("rms_norm", norm_testing, norms.CORRECTNESS),
        ("gelu", gelu_testing, gelus.CORRECTNESS),
        ("rotary", rotary_testing, rotations.CORRECTNESS),
    )
    for name, case, dtype in case_ids(cases, (F32, *HALVES))
]


@pytest.mark.parametrize(("testing", "case", "dtype"), _TABLE)
def test_accuracy(
    testing: ModuleType, case: norms.Case | gelus.Case | rotations.Case, dtype: torch.dtype
) -> None:
    inputs = testing.make_inputs(case, dtype)
    with poisoned_memory():
        results = testing.compute(inputs, "triton")
    testing.check_accuracy(inputs, results)


@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
def test_backward_follows_any_forward(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(norm_backend, "_PARTS", 2)  # several tiles to a program, one cut
    inputs = norm_testing.make_inputs(
        norms.Case("saved", 7, 30, 20, shift=2, bias=bias, added=bias), F32
    )
    monkeypatch.setattr(norm_backend, "_ELEMENTS", 1024)
    call, standard = inputs.call(), norm_testing.make_standard(inputs)
    for first, second in ((norm_reference, norm_backend), (norm_backend, norm_reference)):
        out, *saved = first.forward(call)
        names = list(inputs.differentiable())
        grads = second.backward(call, *saved, inputs.dout, [True] * len(names))
        standard.check({"out": out, **dict(zip(names, grads, strict=True))})


@pytest.mark.parametrize(
    "case",
    [
        norms.Case("long", 2, 5, 75, zeros=True),
        norms.Case("long-shift", 2, 5, 64, shift=2, eps=0.5, added=True),
        norms.Case("long-layer", 2, 5, 75, eps=1e-3, added=True, bias=True, far=True),
        norms.Case("long-layer-shift", 3, 5, 33, shift=1, eps=1e-3, added=True, bias=True),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("dtype", (F32, *HALVES), ids=str)
def test_long_rows(case: norms.Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in chunks of 16 channels, the last one cut."""
    monkeypatch.setattr(norm_backend, "_MAX_TILE", 16)
    monkeypatch.setattr(norm_backend, "_CHUNK", 16)
    monkeypatch.setattr(norm_backend, "_ELEMENTS", 32)  # two rows a tile, as no real call has them
    monkeypatch.setattr(norm_backend, "_PARTS", 2)
    inputs = norm_testing.make_inputs(case, dtype)
    with poisoned_memory():
        results = norm_testing.compute(inputs, "triton")
    norm_testing.check_accuracy(inputs, results)


@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
def test_rows_longer_than_a_tile(bias: bool) -> None:
    case = norms.Case("longer", 1, 2, 8193, shift=1, eps=1e-5, added=True, bias=bias)
    inputs = norm_testing.make_inputs(case, torch.bfloat16)
    norm_testing.check_accuracy(inputs, norm_testing.compute(inputs, "triton"))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = norm_testing.make_inputs(norms.Case("refused", 1, 5, 4), torch.float64)
    x = rotary_testing.make_inputs(rotations.Case("refused", 1, 1, 2, 4), torch.float64)
    rotary = make_call(x.x, x.cos, x.sin)
    for backend, call in ((norm_backend, norm.call()), (rotary_backend, rotary)):
        assert [text for text in backend.supports(call) if "float64 is not one of" in text]
        monkeypatch.setattr(backend, "INTERPRETED", False)
        assert [text for text in backend.supports(call) if "needs a GPU" in text]
    far_shift, rows = {"x": torch.zeros(1, 1, 4), "shift": 2**31}, _without_memory(2**31, 1, 4)
    for far in (far_shift, {"x": rows}, {"x": _without_memory(2**24, 16, 2**14)}):
        found = norm_backend.supports(replace(norm.call(), **far))
        assert [text for text in found if "beyond 32 bits" in text]


def _without_memory(*shape: int) -> torch.Tensor:
    return torch.zeros(()).expand(shape)


def test_offsets_beyond_32_bits() -> None:
    """Batches whose elements start beyond 2**31 are turned alike (memory is not touched)."""
    x = torch.randn(2, 1, 3, 8)
    cos, sin = torch.randn(2, 3, 4).unbind()
    memory = torch.empty(2**32 + 128, dtype=F32)
    far = memory.as_strided(x.shape, (2**31 + 64, 0, 2**30, 1))
    far.copy_(x)
    call = make_call(far, cos, sin)
    out = torch.empty_like(x)
    rotary_backend.plan(call, rotary_backend.target_of(far, True), out).run()
    assert torch.equal(out, rotary_backend.forward(make_call(x, cos, sin)))
