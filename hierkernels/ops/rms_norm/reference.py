"""The definition of hk.rms_norm in eager PyTorch."""

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


def _parts(call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    wide = shifted(call).to(call.accumulator)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    if call.eps_is_added:
        return wide, (length.square() + call.addend).sqrt()
    return wide, length.clamp(min=call.floor)


def rms_norm(call: NormCall) -> torch.Tensor:
    """out, of ordinary differentiable operations."""
    wide, length = _parts(call)
    return (wide / length * (call.weight * call.scale)).to(call.dtype)


def forward(call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, inverse), without a graph."""
    _, length = _parts(call)
    return rms_norm(call), length.squeeze(-1).reciprocal()


def backward(
    call: NormCall, inverse: torch.Tensor, dout: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x and of weight that are wanted."""
    wide, weight = shifted(call).to(inverse.dtype), call.weight.to(inverse.dtype)
    grad, inverse = dout.to(inverse.dtype) * call.scale, inverse[..., None]
    dx = dweight = None
    if wanted[0]:
        along = (grad * weight * wide).sum(-1, keepdim=True) * inverse**3
        along = along.masked_fill(inverse * call.floor >= 1, 0.0)
        dx = grad * weight * inverse - wide * along
        if call.shift:  # back to where it came from
            first, second = dx.split((call.kept, dx.shape[2] - call.kept), dim=-1)
            by = min(call.shift, dx.shape[1])
            dx = torch.cat((first, F.pad(second, (0, 0, -by, by))), dim=-1)
        dx = dx.to(call.x.dtype)
    if wanted[1]:
        dweight = (grad * wide * inverse).sum((0, 1)).to(call.weight.dtype)
    return dx, dweight
