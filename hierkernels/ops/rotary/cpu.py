"""Rotary positions on the CPU: the compiled kernels of csrc/cpu/rowwise."""

from __future__ import annotations

import torch

from hierkernels.native import native
from hierkernels.ops.rotary.call import RotaryCall
from hierkernels.refusals import cpu_reasons


def supports(call: RotaryCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    return cpu_reasons("x", call.x)


def forward(call: RotaryCall) -> torch.Tensor:
    """out."""
    out = call.new_output()
    if out.numel():
        native().rotary(call.x, call.cos, call.sin, call.transposed, out)
    return out
