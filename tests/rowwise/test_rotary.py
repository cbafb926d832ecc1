"""hk.rotary: the definition, the compiled kernel against the oracle, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rowwise_levels import CORE, accuracy_params

import hierkernels as hk
from hierkernels.native import native_error
from hierkernels.ops.rotary.spec import ALL_DTYPES, CORRECTNESS, Case
from hierkernels.ops.rotary.testing import check_accuracy, compute, make_inputs
from hierkernels.testing import poisoned_memory, threads

needs_core = pytest.mark.skipif(CORE is None, reason=f"no compiled core: {native_error()}")
F32, F64 = torch.float32, torch.float64


@pytest.mark.parametrize("case, dtype, isa", accuracy_params("rotary", CORRECTNESS, ALL_DTYPES))
def test_accuracy(case: Case, dtype: torch.dtype, isa: str, set_isa: Callable[[str], None]) -> None:
    set_isa(isa)
    inputs = make_inputs(case, dtype)
    with threads(2), poisoned_memory():
        results = compute(inputs, "cpu")
    check_accuracy(inputs, results)
    assert results["out"].dtype == dtype


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_core)])
def test_is_a_complex_product(backend: str) -> None:
    x = torch.randn(2, 3, 5, 8, dtype=F64)
    angles = torch.randn(5, 4, dtype=F64)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    out = hk.rotary(x, angles.cos(), angles.sin(), backend=backend)
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-14)
    back = hk.rotary(out, angles.cos(), -angles.sin(), backend=backend)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-14)


@needs_core
def test_gradients_of_gradients() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=F64, requires_grad=True)
    cos, sin = torch.randn(2, 3, 2, dtype=F64).unbind()

    def f(x: torch.Tensor) -> torch.Tensor:
        return hk.rotary(x, cos, sin, backend="cpu").square()

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@needs_core
def test_keeps_the_order_of_memory_and_opcheck() -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 5, 4).unbind()
    assert hk.rotary(x, cos, sin).stride() == x.stride()
    torch.library.opcheck(torch.ops.hierkernels.rotary, (x, cos, sin, False, "cpu"))
    compiled = torch.compile(hk.rotary, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, cos, sin), hk.rotary(x, cos, sin)
    assert torch.equal(out, expected)
    got, grad = (torch.autograd.grad(t.square().sum(), x)[0] for t in (out, expected))
    assert torch.equal(got, grad)


X, T = torch.zeros(1, 2, 3, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": 1}, TypeError, "x must be a torch.Tensor, got int"),
        ({"sin": [1]}, TypeError, "sin must be a torch.Tensor, got list"),
        ({"x": X.int()}, TypeError, "x must be float32.*got torch.int32"),
        ({"cos": T.int()}, TypeError, "cos must be float32.*got torch.int32"),
        ({"x": X[0]}, ValueError, r"x must have 4 dimensions.*\(2, 3, 4\)"),
        ({"x": X[..., :3]}, ValueError, "even number of channels, 2 or more, got 3"),
        ({"x": X[..., :0]}, ValueError, "even number of channels, 2 or more, got 0"),
        ({"cos": T[:2]}, ValueError, r"cos must have shape.*= \(3, 2\), got \(2, 2\)"),
        ({"sin": T.to("meta")}, ValueError, r"sin must be on the device of x \(cpu\), got meta"),
        ({"sin": T.clone().requires_grad_()}, ValueError, "sin must not require a gradient"),
        ({"backend": "cuda"}, NotImplementedError, "no rotary kernel"),
    ],
)
def test_bad_input(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.rotary(**({"x": X, "cos": T, "sin": T} | changed))


@needs_core
def test_explain() -> None:
    assert hk.explain("rotary", X, T, T).backend == "cpu"
