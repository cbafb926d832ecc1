"""The causal spatial gating unit in CUDA C++: not there, so this backend refuses and says so."""

from __future__ import annotations

from hierkernels.ops.causal_sgu.call import SguCall


def supports(call: SguCall) -> list[str]:
    """Always a reason: the CUDA core has no such kernel."""
    return ["the CUDA C++ core has no causal_sgu kernel; backend='triton' computes it on GPUs"]
