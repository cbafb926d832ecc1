"""Rotary positions on the CPU: the compiled kernels of csrc/cpu/rowwise."""

from __future__ import annotations

import torch

from hierkernels.native import native, native_error
from hierkernels.ops.rotary.call import RotaryCall


def supports(call: RotaryCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    reasons = []
    if call.device_type != "cpu":
        reasons.append(f"x is on a {call.device_type} device, the cpu backend needs CPU tensors")
    if native() is None:
        reasons.append(f"the compiled kernels are missing: {native_error()}")
    return reasons


def forward(call: RotaryCall) -> torch.Tensor:
    """out."""
    out = call.new_output()
    if out.numel():
        native().rotary(call.x, call.cos, call.sin, call.transposed, out)
    return out
