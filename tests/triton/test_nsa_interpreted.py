"""hk.native_sparse_attention on the Triton backend, interpreted on the CPU: how the branches meet.

Each branch's kernels have tests of their own; the interpreter is slow, so cases are small.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hierkernels.ops.native_sparse_attention.gated_sum import gated_sum
from hierkernels.ops.native_sparse_attention.spec import NsaCase
from hierkernels.ops.native_sparse_attention.testing import (
    check_accuracy,
    compute,
    make_inputs,
)
from hierkernels.testing import poisoned_memory

F32, BF16 = torch.float32, torch.bfloat16


def _case(name: str, preset: str, N: int = 20, H: int = 2, **options) -> NsaCase:
    sizes = {"l": 8, "d": 4, "S": 4, "n": 3, "w": 6, "M": int(preset == "seed")}
    Nk, Hkv = options.pop("Nk", N), options.pop("Hkv", 1)
    return NsaCase(f"{preset}-{name}", preset, 1, H, Hkv, N, Nk, 16, 16, **(sizes | options))


CASES = (
    (_case("n9", "seed", 9), BF16),
    (_case("g3-own-selection", "seed", 10, H=3, shared=False), F32),
    (_case("last-three", "paper", 3, Nk=41, H=4, Hkv=2), F32),
    (_case("shared-tensors", "seed", 6, own_branches=False), F32),
)


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(c, d, id=f"native_sparse_attention-triton-{str(d)[6:]}-{c.name}")
        for c, d in CASES
    ],
)
def test_accuracy(case: NsaCase, dtype: torch.dtype) -> None:
    with poisoned_memory():
        check_accuracy(make_inputs(case, dtype), "triton")


def _tensor(*shape: int, tokens_first: bool = False) -> torch.Tensor:
    B, H, N, D = shape
    if tokens_first:
        return torch.randn(B, N, H, D).transpose(1, 2)
    return torch.randn(shape)


@pytest.mark.parametrize("D", [1, 24, 128])
def test_gated_sum(D: int) -> None:
    """Against the sum written out; each tensor has a layout of its own."""
    shape = (2, 3, 11)
    parts = [_tensor(*shape, D, tokens_first=first) for first in (False, True, False)]
    parts[2] = torch.randn(2, 3, D, 11).mT  # channels apart: copied
    gates = _tensor(*shape, 3, tokens_first=True)
    dout = torch.randn(2, 3, 1, D).expand(*shape, D)
    leaves = [t.requires_grad_() for t in (gates, *parts)]
    expected = torch.einsum("bhns,bhnsd->bhnd", gates, torch.stack(parts, dim=-2))
    with poisoned_memory():
        out = gated_sum(gates, (parts[0], parts[1], parts[2]), "triton")
        grads = torch.autograd.grad(out, leaves, dout)
    torch.testing.assert_close(out, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_gated_sum_of_nothing() -> None:
    parts = [torch.zeros(2, 3, 0, 8, requires_grad=True) for _ in range(3)]
    gates = torch.zeros(2, 3, 0, 3, requires_grad=True)
    out = gated_sum(gates, (parts[0], parts[1], parts[2]), "triton")
    assert out.shape == (2, 3, 0, 8)
    out.sum().backward()
    assert gates.grad is not None and gates.grad.shape == gates.shape


def test_chooses_what_the_reference_chooses() -> None:
    """No score is near a tie here; and the gradients are those of the reference."""
    inputs = make_inputs(_case("choice", "seed", 16), F32)
    assert torch.equal(inputs.choose("triton"), inputs.choose("reference"))
    expected, got = compute(inputs, "reference"), compute(inputs, "triton")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4, msg=name)
