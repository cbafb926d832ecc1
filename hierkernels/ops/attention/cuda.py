"""Attention in CUDA C++: not there yet, so this backend refuses and says so."""

from __future__ import annotations

from hierkernels.ops.attention.call import AttentionCall


def supports(call: AttentionCall) -> list[str]:
    """Always a reason: the CUDA core has no attention kernel."""
    return ["the CUDA C++ core has no attention kernel; backend='triton' computes it on GPUs"]
