"""hierkernels.products.linear against F.linear: results, gradients, and when it is F.linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hierkernels as hk
from hierkernels import products

needs_onednn = pytest.mark.skipif(not products._HAS_ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The shapes of oneDNN's products."""
    seen = []
    product = products._product

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return product(x, weight, bias)

    monkeypatch.setattr(products, "_product", counting)
    return seen


@needs_onednn
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", [(2, 7), (3, 5, 7), (2, 3, 1, 7), (40, 33)], ids=str)
def test_results_and_gradients(shape: tuple[int, ...], bias: bool, calls: list[tuple]) -> None:
    """At most twice the error of F.linear, and a rounding of each term."""
    x, weight = torch.randn(shape), torch.randn(6, shape[-1])
    offset = torch.randn(6) if bias else None
    dout = torch.randn(6, *shape[:-1]).movedim(0, -1)  # not contiguous

    def run(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, offset) if t is not None]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    exact, eager = run(F.linear, torch.float64), run(F.linear, torch.float32)
    got = run(products.linear, torch.float32)
    assert len(calls) == 2  # forward, and backward to x
    eps = torch.finfo(torch.float32).eps
    for g, e, t in zip(got, eager, exact, strict=True):
        assert g.shape == t.shape
        error, allowed = (g - t).abs().max(), 2 * (e - t).abs().max()
        assert error <= allowed + eps * t.abs().max()


@needs_onednn
def test_only_the_gradients_that_are_wanted(calls: list[tuple]) -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    products.linear(x, weight).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 3))


def test_gradients_of_gradients() -> None:
    x, weight = torch.randn(3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    found = []
    for function in (products.linear, F.linear):
        out = function(x, weight).square().sum()
        first = torch.autograd.grad(out, (x, weight), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))
    torch.testing.assert_close(*found)


def test_everything_else_is_left_to_pytorch(calls: list[tuple]) -> None:
    x, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    expected = F.linear(x, weight, bias)
    with hk.use_backend("reference"):
        assert torch.equal(products.linear(x, weight, bias), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
    for dtype in (torch.float64, torch.bfloat16):
        to = [t.to(dtype) for t in (x, weight, bias)]
        assert torch.equal(products.linear(*to), F.linear(*to))
    assert torch.equal(products.linear(x[0], weight, bias), F.linear(x[0], weight, bias))
    assert products.linear(x[:0], weight, bias).shape == (0, 4)
    compiled = torch.compile(products.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), expected)
    assert not calls
    for wrong in ((x, weight[:, :2]), (x, weight, bias[:2]), (x, weight.double())):
        with pytest.raises(RuntimeError):
            products.linear(*wrong)
