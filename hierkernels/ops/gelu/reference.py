"""The definition of hk.gelu in eager PyTorch."""

from __future__ import annotations

import math

import torch

from hierkernels.ops.gelu.call import GeluCall


def supports(call: GeluCall) -> list[str]:
    """The reference computes everything."""
    return []


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def forward(call: GeluCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second), of ordinary differentiable operations."""
    x, empty = _wide(call.x), call.x.new_empty(0)
    if call.form == "plain":
        return (x * _normal_cdf(x)).to(call.x.dtype), empty
    a, b = x.chunk(2, dim=-1)
    right = b * _normal_cdf(b)
    if call.form == "gated":
        return (a * right).to(call.x.dtype), empty
    left = a * _normal_cdf(a)
    return left.to(call.x.dtype), right.to(call.x.dtype)


def backward(call: GeluCall, dfirst: torch.Tensor, dsecond: torch.Tensor) -> torch.Tensor:
    """The gradient of x."""
    x = _wide(call.x)
    slope = _normal_cdf(x) + x * torch.exp(-0.5 * x * x) * (0.5 / math.pi) ** 0.5
    if call.form == "plain":
        grad = _wide(dfirst) * slope
    elif call.form == "halves":
        grad = torch.cat((_wide(dfirst), _wide(dsecond)), dim=-1) * slope
    else:
        a, b = x.chunk(2, dim=-1)
        da = _wide(dfirst) * b * _normal_cdf(b)
        grad = torch.cat((da, _wide(dfirst) * a * slope.chunk(2, dim=-1)[1]), dim=-1)
    return grad.to(call.x.dtype)
