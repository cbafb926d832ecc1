"""Norms and rotary positions that several models share, against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch

from python_models.hierarchical_layers import RMSNorm as HierarchicalNorm
from python_models.layers import PlainRMSNorm, RMSNorm, token_shift
from python_models.rotary import LocalRotaryEmbedding, apply_rotary, project_turned


def make(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_norms_round_for_the_product_that_follows() -> None:
    """Under autocast the result is what the next layer would have rounded it to."""
    norm, x = RMSNorm(6), make(2, 3, 6, dtype=torch.float32)
    plain = norm(x, 1)
    assert plain.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(norm(x, 1), plain.to(dtype))
            assert norm(x.to(dtype)).dtype == dtype
            other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
            assert norm(x.to(other)).dtype == dtype
            assert norm.double()(x.double()).dtype == torch.float64
        norm.float()


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_norms_shift_tokens(shift: int) -> None:
    x = make(2, 4, 7)
    for norm in (RMSNorm(7), HierarchicalNorm(7)):
        norm = norm.double()
        expected = norm(token_shift(x, shift))
        torch.testing.assert_close(norm(x, shift), expected, rtol=0, atol=1e-14)


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
            q, k, v = project_turned(inputs, layer, heads, table.turning_tables(length, ahead))
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
