"""Rotary positions in CUDA C++: not there, so this backend refuses and says so."""

from __future__ import annotations

from hierkernels.ops.rotary.call import RotaryCall


def supports(call: RotaryCall) -> list[str]:
    """Always a reason: the CUDA core has no such kernel."""
    return ["the CUDA C++ core has no rotary kernel"]
