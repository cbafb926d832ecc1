"""GELU on the CPU: the compiled kernels of csrc/cpu/rowwise."""

from __future__ import annotations

import torch

from hierkernels.native import native
from hierkernels.ops.gelu.call import FORMS, GeluCall
from hierkernels.refusals import cpu_reasons


def supports(call: GeluCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    return cpu_reasons("x", call.x)


def _second(call: GeluCall, second: torch.Tensor) -> torch.Tensor | None:
    return second.contiguous() if call.form == "halves" else None


def forward(call: GeluCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second)."""
    first, second = call.new_outputs()
    if first.numel():
        native().gelu_forward(call.x, FORMS.index(call.form), first, _second(call, second))
    return first, second


def backward(call: GeluCall, dfirst: torch.Tensor, dsecond: torch.Tensor) -> torch.Tensor:
    """The gradient of x."""
    dx = torch.empty_like(call.x)
    if dx.numel():
        grads = dfirst.contiguous(), _second(call, dsecond)
        native().gelu_backward(call.x, FORMS.index(call.form), *grads, dx)
    return dx
