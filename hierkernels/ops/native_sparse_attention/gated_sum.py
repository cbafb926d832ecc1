"""The sum of the branches, each times its gate.

PyTorch's own operations take several passes over memory, and on CPUs new memory for each, which
costs more than what is written to it. A kernel reads and writes every tensor once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels.eager import are_plain, is_transformed, is_unwatched
from hierkernels.native import native
from hierkernels.ops.native_sparse_attention import cpu_gated_sum
from hierkernels.ops.native_sparse_attention.branches import Branches


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        kernels: ModuleType | None, gates: torch.Tensor, *parts: torch.Tensor
    ) -> torch.Tensor:
        if kernels is not None:
            return kernels.forward(gates, parts)
        a, b, c = gates.unsqueeze(-2).unbind(-1)
        out = parts[0] * a
        out.addcmul_(parts[1], b)
        return out.addcmul_(parts[2], c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.kernels, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gates, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph the gradients need a graph
            dgates = torch.stack([(grad * part).sum(-1) for part in parts], -1)
            return None, dgates, *(grad * gate for gate in gates.unsqueeze(-2).unbind(-1))
        if ctx.kernels is not None:
            return None, *ctx.kernels.backward(gates, tuple(parts), grad)
        product, dgates = torch.empty_like(parts[0]), torch.empty_like(gates)
        for part, dgate in zip(parts, dgates.unbind(-1), strict=True):
            dgate.copy_(torch.mul(grad, part, out=product).sum(-1))
        a, b, c = gates.unsqueeze(-2).unbind(-1)
        return None, dgates, grad * a, grad * b, torch.mul(grad, c, out=product)


def _triton(tensors: tuple[torch.Tensor, ...], backend: str | None) -> ModuleType | None:
    """Triton's kernels, where they are asked for, and on GPUs that they support.

    Raises NotImplementedError, with reasons, if they are asked for and refuse.
    """
    try:
        from hierkernels.ops.native_sparse_attention import triton_gated_sum
    except ImportError:
        return None
    reasons = triton_gated_sum.reasons(tensors[1])
    if reasons and backend == "triton":
        raise NotImplementedError("gated sum: backend 'triton' refuses: " + "; ".join(reasons))
    return None if reasons else triton_gated_sum


def _kernels(tensors: tuple[torch.Tensor, ...], backend: str | None) -> ModuleType | None:
    """The kernels that compute it; None: PyTorch's operations do."""
    if backend == "triton" or (backend is None and tensors[0].is_cuda):
        return _triton(tensors, backend) if are_plain(tensors) else None
    is_plain = not tensors[0].is_cuda and native() is not None and is_unwatched(tensors)
    return cpu_gated_sum if is_plain and tensors[1].dtype in cpu_gated_sum.DTYPES else None


def gated_sum(gates: torch.Tensor, parts: Branches, backend: str | None) -> torch.Tensor:
    """The sum over s of gates[..., s] parts[s]: gates (B, H, N, 3), parts (B, H, N, D)."""
    gates = gates.to(parts[0].dtype)
    # A compiler fuses the passes itself; transforms take PyTorch's operations apart.
    if torch.compiler.is_compiling() or is_transformed():
        a, b, c = gates.unsqueeze(-2).unbind(-1)
        return parts[0] * a + parts[1] * b + parts[2] * c
    return _GatedSum.apply(_kernels((gates, *parts), backend), gates, *parts)
