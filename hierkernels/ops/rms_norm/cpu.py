"""Root-mean-square norm and layer norm on the CPU: the compiled kernels of csrc/cpu/rowwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hierkernels.native import native
from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.refusals import cpu_reasons

# The gradients of weight and bias are summed in so many parts of the rows, whatever the number of
# threads: their bits do not depend on that.
_PARTS = 64


def supports(call: NormCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    return cpu_reasons("x", call.x)


def _problem(call: NormCall, inverse: torch.Tensor, mean: torch.Tensor) -> tuple:
    weight, bias = (None if p is None else p.to(call.accumulator) for p in (call.weight, call.bias))
    sizes = call.floor, call.addend, call.scale, call.shift, call.kept
    return call.x, weight, bias, *sizes, inverse, None if bias is None else mean


def forward(call: NormCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, inverse, mean)."""
    out, inverse, mean = call.new_outputs()
    if inverse.numel():
        native().norm_forward(*_problem(call, inverse, mean), out)
    return out, inverse, mean


def backward(
    call: NormCall,
    inverse: torch.Tensor,
    mean: torch.Tensor,
    dout: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, of weight and of bias that are wanted."""
    B, N, C = call.x.shape
    dx = torch.empty_like(call.x) if wanted[0] else None
    if not call.x.numel():
        return dx, *(torch.zeros_like(p) for p in call.parameters)
    parts: list[torch.Tensor | None] = [None, None]
    if any(wanted[1:]):
        shape = len(call.parameters), min(_PARTS, B * N), C
        parts[: shape[0]] = inverse.new_empty(shape).unbind()
    native().norm_backward(*_problem(call, inverse, mean), dout.contiguous(), dx, *parts)
    return dx, *(
        None if part is None else part.sum(0).to(call.weight.dtype)
        for part, _ in zip(parts, call.parameters, strict=False)
    )
