"""Root-mean-square norm on the CPU: the compiled kernels of csrc/cpu/rowwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hierkernels.native import native
from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.refusals import cpu_reasons

# The gradient of the weight is summed in so many parts of the rows, whatever the number of threads:
# its bits do not depend on that.
_PARTS = 64


def supports(call: NormCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    return cpu_reasons("x", call.x)


def _problem(call: NormCall) -> tuple:
    weight = call.weight.to(call.accumulator)
    return call.x, weight, call.floor, call.addend, call.scale, call.shift, call.kept


def forward(call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, inverse)."""
    out, inverse = call.new_outputs()
    if inverse.numel():
        native().rms_norm_forward(*_problem(call), out, inverse)
    return out, inverse


def backward(
    call: NormCall, inverse: torch.Tensor, dout: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x and of weight that are wanted."""
    B, N, C = call.x.shape
    dx = torch.empty_like(call.x) if wanted[0] else None
    if not call.x.numel():
        return dx, torch.zeros_like(call.weight) if wanted[1] else None
    parts = inverse.new_empty(min(_PARTS, B * N), C) if wanted[1] else None
    native().rms_norm_backward(*_problem(call), inverse, dout.contiguous(), dx, parts)
    return dx, None if parts is None else parts.sum(0).to(call.weight.dtype)
