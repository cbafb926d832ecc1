"""The definition of hk.rotary in eager PyTorch."""

from __future__ import annotations

import torch

from hierkernels.ops.rotary.call import RotaryCall


def supports(call: RotaryCall) -> list[str]:
    """The reference computes everything."""
    return []


def forward(call: RotaryCall) -> torch.Tensor:
    """out; of ordinary differentiable operations."""
    first, second = call.x.to(call.cos.dtype).chunk(2, dim=-1)
    cos, sin = call.cos, -call.sin if call.transposed else call.sin
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(call.x.dtype)
