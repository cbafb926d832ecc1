"""Norms and rotary positions that several models share, against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from python_models.layers import PlainRMSNorm, RMSNorm, normalize, rms_norm
from python_models.rotary import LocalRotaryEmbedding, apply_rotary, project_turned


def make(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def formula(x: torch.Tensor, gain: torch.Tensor, floor: float) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=floor) * gain


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 8), (1, 1), (0, 4), (2, 1, 3, 5)])
@pytest.mark.parametrize("floor", [1e-12, 2.5], ids=["no-floor", "floor"])
def test_normalize(shape: tuple[int, ...], floor: float) -> None:
    """With a floor that is above the length of some rows and not of others."""
    x, gain = make(*shape).requires_grad_(), make(shape[-1]).requires_grad_()
    expected, got = formula(x, gain, floor), normalize(x, gain, floor)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    grad = make(*shape)
    for g, e in zip(
        torch.autograd.grad(got, (x, gain), grad, retain_graph=True),
        torch.autograd.grad(expected, (x, gain), grad),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-12)
    if x.numel():
        assert torch.autograd.gradcheck(normalize, (x, gain, floor))
        assert torch.autograd.gradgradcheck(normalize, (x, gain, floor))


def test_normalize_other_layouts_and_zero_rows() -> None:
    gain = make(6).requires_grad_()
    x = make(6, 4, 3).permute(2, 1, 0).requires_grad_()
    normalize(x, gain, 1e-12).sum().backward()  # the gradient is one number, expanded
    got = x.grad, gain.grad
    expected = torch.autograd.grad(formula(x, gain, 1e-12).sum(), (x, gain))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    zero = torch.zeros(2, 6, requires_grad=True)
    out = normalize(zero, gain.float(), 1e-2)
    assert not out.any()
    (grad,) = torch.autograd.grad(out.sum(), zero)
    torch.testing.assert_close(grad, (gain.detach().float() * 100).expand(2, 6))
    frozen = normalize(x.detach(), gain, 1e-12)
    torch.testing.assert_close(torch.autograd.grad(frozen.sum(), gain)[0], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gain_dtype", ["same", "float32"])
def test_normalize_is_as_accurate_as_eager(dtype: torch.dtype, gain_dtype: str) -> None:
    """At most twice the error of the formula in that precision, and a rounding."""
    gain_dtype = torch.float32 if gain_dtype == "float32" else dtype
    x, gain, grad = make(33, 40, dtype=dtype), make(40, dtype=gain_dtype), make(33, 40)
    out_dtype = torch.promote_types(dtype, gain_dtype)

    def run(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in inputs]
        out = function(*inputs, 1e-6)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    exact = run(formula, x.double(), gain.double())
    eager = run(formula, x, gain)
    got = run(normalize, x, gain)
    assert got[0].dtype == out_dtype
    for g, e, t in zip(got, eager, exact, strict=True):
        assert g.dtype == e.dtype
        rounding = torch.finfo(g.dtype).eps * t.abs().max()
        assert (g - t).abs().max() <= 2 * (e - t).abs().max() + rounding


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(5).double()
    torch.nn.init.normal_(norm.g)
    x = make(3, 5)
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * norm.g
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(norm(torch.zeros(2, 5).double()), torch.zeros(2, 5).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_rms_norm_is_that_of_pytorch(dtype: torch.dtype) -> None:
    """Results and gradients, of ordinary rows and of rows that the small number outweighs."""
    plain, theirs = PlainRMSNorm(8).to(dtype), torch.nn.RMSNorm(8).to(dtype)
    torch.nn.init.normal_(plain.weight)
    theirs.load_state_dict(plain.state_dict())
    x, grad = make(3, 4, 8, dtype=dtype), make(4, 3, 8, dtype=dtype)
    x[1] *= torch.finfo(dtype).eps
    got, expected = [], []
    for norm, results in ((plain, got), (theirs, expected)):
        leaf = x.mT.contiguous().mT.requires_grad_()
        out = norm(leaf)
        results += [out, *torch.autograd.grad(out, (leaf, norm.weight), grad.transpose(0, 1))]
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance * e.abs().max().item())
    if dtype == torch.float64:
        x, gain = make(2, 5).requires_grad_(), make(5).requires_grad_()
        assert torch.autograd.gradcheck(rms_norm, (x, gain, 0.1))
        assert torch.autograd.gradgradcheck(rms_norm, (x, gain, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale_base", "ahead"), [(None, 0), (None, 6), (16, 0)])
def test_projection_to_turned_is_projection_and_turning(
    scale_base: int | None, ahead: int, dtype: torch.dtype
) -> None:
    """In float64 equal; in others by the rule. Products of queries and keys, values, gradients."""
    heads, length = 3, 11
    linear = torch.nn.Linear(7, 3 * heads * 4, bias=False, dtype=dtype)
    rotary = LocalRotaryEmbedding(4, scale_base)
    x = make(2, length, 7, dtype=dtype).requires_grad_()

    def products(double: bool, fused: bool) -> list[torch.Tensor]:
        table = rotary.to(torch.float64 if double else torch.float32)
        layer = copy.deepcopy(linear).to(torch.float64 if double else dtype)
        inputs = x.double() if double else x
        if fused:
            q, k, v = project_turned(inputs, layer, heads, table.phases(length, ahead))
        else:
            parts = layer(inputs).unflatten(-1, (3, heads, 4)).permute(2, 0, 3, 1, 4)
            (q_cos, q_sin), (k_cos, k_sin) = table.tables(length + ahead)
            q = apply_rotary(parts[0], (q_cos[ahead:], q_sin[ahead:]))
            k = apply_rotary(parts[1], (k_cos[:length], k_sin[:length]))
            v = parts[2]
        scores = q.double() @ k.double().mT
        out = scores @ v.double()
        return [scores, v, *torch.autograd.grad(out.square().sum(), (x, layer.weight))]

    exact, eager = products(True, False), products(False, False)
    for g, t in zip(products(True, True), exact, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-9, atol=1e-9)
    for g, e, t in zip(products(False, True), eager, exact, strict=True):
        rounding = torch.finfo(g.dtype).eps * t.double().abs().max()
        assert (g.double() - t).abs().max() <= 2 * (e.double() - t).abs().max() + rounding


def test_compiled_norm_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gain = make(4, 6), make(6)
    expected = normalize(x, gain, 1e-12)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(normalize(x, gain, 1e-12), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(F.normalize(x, dim=-1) * gain, expected, rtol=0, atol=1e-14)
