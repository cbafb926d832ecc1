"""Root-mean-square norm and layer norm on the CPU: the compiled kernels of csrc/cpu/rowwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hierkernels.native import native
from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.refusals import cpu_reasons


def supports(call: NormCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    return cpu_reasons("x", call.x)


def _problem(call: NormCall, inverse: torch.Tensor, mean: torch.Tensor) -> tuple:
    weight, bias = call.weight, call.bias
    if weight.dtype != inverse.dtype:
        weight, bias = weight.to(inverse.dtype), None if bias is None else bias.to(inverse.dtype)
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
    dx = torch.empty_like(call.x) if wanted[0] else None
    if not call.x.numel():
        return dx, *(torch.zeros_like(p) for p in call.parameters)
    grads: list[torch.Tensor | None] = [None] * len(call.parameters)
    if any(wanted[1:]):
        grads = [torch.empty_like(p, dtype=call.accumulator) for p in call.parameters]
    dweight, dbias = (*grads, None)[:2]
    problem = _problem(call, inverse, mean)
    native().norm_backward(*problem, dout.contiguous(), dx, dweight, dbias)
    return dx, *(None if grad is None else grad.to(call.weight.dtype) for grad in grads)
