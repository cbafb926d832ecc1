"""The CPU's sum of gated branches against the sum written out, by instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hierkernels.native import native
from hierkernels.ops.attention.spec import ALL_DTYPES
from hierkernels.ops.native_sparse_attention.gated_sum import gated_sum
from hierkernels.testing import poisoned_memory

CORE = native()
if CORE is None:
    pytest.skip("the compiled core is missing", allow_module_level=True)
LEVELS = [isa for isa in CORE.cpu_isas() if isa in ("generic", "avx2", "avx512")]


def _tensor(*shape: int, dtype: torch.dtype, tokens_first: bool = False) -> torch.Tensor:
    if tokens_first:
        B, H, N, D = shape
        return torch.randn(B, N, H, D).to(dtype).transpose(1, 2)
    return torch.randn(shape).to(dtype)


def _written_out(gates: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhns,bhnsd->bhnd", gates, torch.stack(parts, dim=-2))


@pytest.mark.parametrize("D", [1, 24, 64])
@pytest.mark.parametrize("isa", LEVELS)
def test_sum_and_gradients(isa: str, D: int, set_isa: Callable[[str], None]) -> None:
    """Each tensor has a layout of its own. One rounding of a float32 sum at most."""
    set_isa(isa)
    torch.manual_seed(D)
    shape = (2, 3, 11)
    for dtype in ALL_DTYPES:
        parts = [_tensor(*shape, D, dtype=dtype, tokens_first=x) for x in (False, True, False)]
        parts[2] = torch.randn(2, 3, D, 11).to(dtype).mT  # channels apart: copied
        gates = _tensor(*shape, 3, dtype=dtype, tokens_first=True)
        dout = torch.randn(2, 3, 1, D).to(dtype).expand(*shape, D)
        leaves = [t.requires_grad_() for t in (gates, *parts)]
        with poisoned_memory():
            out = gated_sum(gates, (parts[0], parts[1], parts[2]), "cpu")
            grads = torch.autograd.grad(out, leaves, dout)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        expected = _written_out(*wide)
        exact = torch.autograd.grad(expected, wide, dout.double())
        eps = torch.finfo(dtype).eps
        accumulator = min(eps, torch.finfo(torch.float32).eps)
        for got, wanted in zip((out, *grads), (expected, *exact), strict=True):
            assert got.dtype == dtype
            largest = wanted.abs().max().item()
            torch.testing.assert_close(
                got.double(), wanted, rtol=eps / 2 * 1.01, atol=(D + 4) * accumulator * largest
            )


def test_large_sums_are_those_of_small_ones() -> None:
    """From 4 MiB on, results go past the caches."""
    B, H, N, D = 1, 2, 8192, 64
    parts = [torch.randn(B, N, H, D).transpose(1, 2).requires_grad_() for _ in range(3)]
    gates = torch.rand(B, H, N, 3).requires_grad_()
    dout = torch.randn(B, H, N, D)
    leaves = (gates, *parts)
    out = gated_sum(gates, (parts[0], parts[1], parts[2]), "cpu")
    grads = torch.autograd.grad(out, leaves, dout)
    part = [t.detach()[:, :, -100:].contiguous().requires_grad_() for t in leaves]
    small = gated_sum(part[0], (part[1], part[2], part[3]), "cpu")
    few = torch.autograd.grad(small, part, dout[:, :, -100:])
    for large, wanted in zip((out, *grads), (small, *few), strict=True):
        assert torch.equal(large[:, :, -100:], wanted)


def test_sum_of_nothing() -> None:
    for shape in ((2, 3, 0), (0, 1, 4)):
        parts = [torch.zeros(*shape, 8, requires_grad=True) for _ in range(3)]
        gates = torch.zeros(*shape, 3, requires_grad=True)
        out = gated_sum(gates, (parts[0], parts[1], parts[2]), "cpu")
        assert out.shape == (*shape, 8)
        out.sum().backward()
        assert gates.grad is not None and gates.grad.shape == gates.shape


def test_repeated_gates() -> None:
    """One gate for all tokens, expanded: its gradient is summed by PyTorch."""
    gates = torch.rand(1, 2, 1, 3, requires_grad=True)
    parts = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    out = gated_sum(gates.expand(1, 2, 5, 3), (parts[0], parts[1], parts[2]), "cpu")
    torch.testing.assert_close(out, _written_out(gates.expand(1, 2, 5, 3), *parts))
    out.sum().backward()
    assert gates.grad is not None
    expected = torch.stack(parts, dim=-1).sum((2, 3))
    torch.testing.assert_close(gates.grad[:, :, 0], expected)
