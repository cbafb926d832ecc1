"""The definition of hk.rms_norm and hk.layer_norm in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hierkernels.ops.rms_norm.call import NormCall


def supports(call: NormCall) -> list[str]:
    """The reference computes everything."""
    return []


def shifted(call: NormCall) -> torch.Tensor:
    """x with the second half of its channels delayed, zeros first."""
    if not call.shift:
        return call.x
    first, second = call.x.split((call.kept, call.x.shape[2] - call.kept), dim=-1)
    by = min(call.shift, call.x.shape[1])
    return torch.cat((first, F.pad(second, (0, 0, by, -by))), dim=-1)


def _parts(call: NormCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shifted row in the accumulator's type, less its mean in a layer norm, length and mean."""
    wide = shifted(call).to(call.accumulator)
    mean = wide.new_empty(0)
    if call.bias is not None:
        mean = wide.mean(-1, keepdim=True)
        wide = wide - mean
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    if call.eps_is_added:
        return wide, (length.square() + call.addend).sqrt(), mean
    return wide, length.clamp(min=call.floor), mean


def norm(call: NormCall) -> torch.Tensor:
    """out, of ordinary differentiable operations."""
    wide, length, _ = _parts(call)
    out = wide / length * (call.weight * call.scale)
    return (out if call.bias is None else out + call.bias).to(call.dtype)


def forward(call: NormCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, inverse, mean), without a graph."""
    _, length, mean = _parts(call)
    inverse = length.squeeze(-1).reciprocal()
    return norm(call), inverse, mean.view_as(inverse) if mean.numel() else mean.view(0)


def backward(
    call: NormCall,
    inverse: torch.Tensor,
    mean: torch.Tensor,
    dout: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, of weight and of bias that are wanted."""
    wide, weight = shifted(call).to(inverse.dtype), call.weight.to(inverse.dtype)
    if call.bias is not None:
        wide = wide - mean[..., None]
    grad, inverse = dout.to(inverse.dtype) * call.scale, inverse[..., None]
    dx = dweight = dbias = None
    if wanted[0]:
        along = (grad * weight * wide).sum(-1, keepdim=True) * inverse**3
        along = along.masked_fill(inverse * call.floor >= 1, 0.0)
        dx = grad * weight * inverse - wide * along
        if call.bias is not None:
            dx = dx - dx.mean(-1, keepdim=True)
        if call.shift:  # back to where it came from
            first, second = dx.split((call.kept, dx.shape[2] - call.kept), dim=-1)
            by = min(call.shift, dx.shape[1])
            dx = torch.cat((first, F.pad(second, (0, 0, -by, by))), dim=-1)
        dx = dx.to(call.x.dtype)
    if wanted[1]:
        dweight = (grad * wide * inverse).sum((0, 1)).to(call.weight.dtype)
    if call.bias is None:
        return dx, dweight
    if wanted[2]:
        dbias = dout.to(inverse.dtype).sum((0, 1)).to(call.bias.dtype)
    return dx, dweight, dbias
