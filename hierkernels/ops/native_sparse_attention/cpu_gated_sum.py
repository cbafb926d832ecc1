"""The sum of gated branches on the CPU: the compiled kernels of csrc/cpu/gated_sum."""

from __future__ import annotations

import torch

from hierkernels.native import native
from hierkernels.ops.attention.call import unit_stride

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def forward(gates: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """out (B, H, N, D)."""
    parts = tuple(map(unit_stride, parts))
    out = torch.empty_like(parts[0])
    native().gated_sum_forward(gates, parts, out)
    return out


def backward(
    gates: torch.Tensor, parts: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(dgates, dfirst, dsecond, dthird)."""
    parts, grad = tuple(map(unit_stride, parts)), unit_stride(grad)
    dgates, dparts = torch.empty_like(gates), tuple(map(torch.empty_like, parts))
    native().gated_sum_backward(gates, parts, grad, dgates, dparts)
    return dgates, *dparts
