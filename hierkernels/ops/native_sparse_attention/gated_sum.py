"""The sum of the branches, each times its gate."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels.ops.native_sparse_attention.branches import Branches


class _GatedSum(torch.autograd.Function):
    """The sum in one pass after another over the output, without a stack of the branches."""

    @staticmethod
    def forward(
        gates: torch.Tensor, first: torch.Tensor, second: torch.Tensor, third: torch.Tensor
    ) -> torch.Tensor:
        a, b, c = gates.unsqueeze(-2).unbind(-1)
        out = first * a
        out.addcmul_(second, b)
        return out.addcmul_(third, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gates, *parts = ctx.saved_tensors
        dgates = torch.stack([(grad * part).sum(-1) for part in parts], dim=-1)
        return dgates, *(grad * gate for gate in gates.unsqueeze(-2).unbind(-1))


def gated_sum(gates: torch.Tensor, parts: Branches, backend: str | None) -> torch.Tensor:
    """The sum over s of gates[..., s] parts[s]: gates (B, H, N, 3), parts (B, H, N, D)."""
    return _GatedSum.apply(gates.to(parts[0].dtype), *parts)
