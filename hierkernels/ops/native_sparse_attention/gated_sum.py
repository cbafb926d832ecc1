"""The sum of the branches, each times its gate.

On CPUs it is a percent or two of the operator, and PyTorch's own operations are used, in few passes
and without a stack of the branches. On GPUs, where the branches are fast and this moves as many
bytes as they do, a kernel of its own reads every tensor once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hierkernels.ops.native_sparse_attention.branches import Branches


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(by_kernel: bool, gates: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        if by_kernel:
            from hierkernels.ops.native_sparse_attention import triton_gated_sum

            return triton_gated_sum.forward(gates, parts)
        a, b, c = gates.unsqueeze(-2).unbind(-1)
        out = parts[0] * a
        out.addcmul_(parts[1], b)
        return out.addcmul_(parts[2], c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.by_kernel, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gates, *parts = ctx.saved_tensors
        if ctx.by_kernel:
            from hierkernels.ops.native_sparse_attention import triton_gated_sum

            return None, *triton_gated_sum.backward(gates, tuple(parts), grad)
        # Large new memory costs more than what is written to it: one product after another.
        product, dgates = torch.empty_like(parts[0]), torch.empty_like(gates)
        for part, dgate in zip(parts, dgates.unbind(-1), strict=True):
            dgate.copy_(torch.mul(grad, part, out=product).sum(-1))
        a, b, c = gates.unsqueeze(-2).unbind(-1)
        return None, dgates, grad * a, grad * b, torch.mul(grad, c, out=product)


def _has_kernel(t: torch.Tensor, backend: str | None) -> bool:
    """Whether Triton computes it: where it is asked for, and on GPUs if nothing is."""
    if backend == "triton":
        return True
    if backend is not None or not t.is_cuda:
        return False
    try:
        from hierkernels.ops.native_sparse_attention.triton_gated_sum import DTYPES
    except ImportError:
        return False
    return t.dtype in DTYPES


def gated_sum(gates: torch.Tensor, parts: Branches, backend: str | None) -> torch.Tensor:
    """The sum over s of gates[..., s] parts[s]: gates (B, H, N, 3), parts (B, H, N, D)."""
    gates = gates.to(parts[0].dtype)
    if torch.compiler.is_compiling():  # which fuses the passes itself
        a, b, c = gates.unsqueeze(-2).unbind(-1)
        return parts[0] * a + parts[1] * b + parts[2] * c
    return _GatedSum.apply(_has_kernel(parts[0], backend), gates, *parts)
