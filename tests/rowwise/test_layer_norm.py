"""hk.layer_norm: F.layer_norm's results and gradients; its accuracy is in test_rms_norm.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hierkernels as hk
from hierkernels.native import native, native_error
from python_models.layers import LayerNorm, token_shift

CORE = native()
needs_core = pytest.mark.skipif(CORE is None, reason=f"no compiled core: {native_error()}")
F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_core)])
@pytest.mark.parametrize("shift", [0, 1, 9])
def test_is_pytorchs_after_token_shift(shift: int, backend: str) -> None:
    x, grad = torch.randn(2, 3, 6, 12, dtype=F64).unbind()
    weight, bias = torch.randn(2, 12, dtype=F64).unbind()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = hk.layer_norm(*leaves, eps=0.1, shift=shift, backend=backend)
    expected = F.layer_norm(token_shift(x, shift) if shift else x, (12,), weight, bias, 0.1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    got = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, grad), rtol=0, atol=1e-12)


@needs_core
@pytest.mark.parametrize("shift", [0, 2])
def test_gradcheck(shift: int) -> None:
    x = torch.randn(2, 4, 5, dtype=F64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=F64, requires_grad=True) for _ in range(2))

    def f(*leaves: torch.Tensor, backend: str = "cpu") -> torch.Tensor:
        return hk.layer_norm(*leaves, eps=0.1, shift=shift, backend=backend)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    again = torch.autograd.gradgradcheck
    assert again(lambda *leaves: f(*leaves, backend="reference"), (x, weight, bias))


@needs_core
def test_opcheck_and_compile() -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
    problem = (x, weight, bias, 1e-5, True, 1, BF16)
    torch.library.opcheck(torch.ops.hierkernels.rms_norm_forward, (*problem, "cpu"))
    inverse, mean = torch.rand(2, 2, 5).unbind()
    detached = (*(t.detach() for t in problem[:3]), *problem[3:], inverse.clone(), mean.clone())
    dout, wanted = torch.randn(2, 5, 6).bfloat16(), [True, False, True]
    torch.library.opcheck(torch.ops.hierkernels.rms_norm_backward, (*detached, dout, wanted, "cpu"))
    compiled = torch.compile(hk.layer_norm, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, weight, bias), hk.layer_norm(x, weight, bias)
    assert torch.equal(out, expected)
    got = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert all(map(torch.equal, got, torch.autograd.grad(expected.sum(), (x, weight, bias))))


@pytest.mark.parametrize("enters_product", [False, True])
def test_module_is_nn_layer_norm(enters_product: bool) -> None:
    norm, plain = LayerNorm(8, enters_product=enters_product), torch.nn.LayerNorm(8)
    norm.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", BF16):
        assert norm(x).dtype == (BF16 if enters_product else torch.float32)
        assert norm(x.bfloat16()).dtype == BF16
    assert norm.double()(x.double()).dtype == F64


X, W = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"bias": None}, TypeError, "bias must be a torch.Tensor, got NoneType"),
        ({"bias": W[:3]}, ValueError, r"bias must have one element a channel.*\(3,\)"),
        ({"bias": W.double()}, TypeError, "bias must be torch.float32 where x is"),
        ({"bias": W.to("meta")}, ValueError, r"bias must be on the device of x \(cpu\)"),
        ({"x": X.bfloat16(), "bias": W.bfloat16()}, TypeError, "must have the same dtype"),
        ({"eps": 0}, ValueError, "eps must be above 0 and finite, got 0"),
        ({"shift": -1}, ValueError, "shift must be at least 0 and at most "),
        ({"backend": "cuda"}, NotImplementedError, "no layer_norm kernel"),
    ],
)
def test_bad_input(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hk.layer_norm(**({"x": X, "weight": W, "bias": W} | changed))


def test_explain_names_the_refusals() -> None:
    choice = hk.explain("layer_norm", X, W, W, shift=1)
    assert choice.backend == ("cpu" if CORE else "reference")
    assert "no layer_norm kernel" in choice.refusals["cuda"][0]
