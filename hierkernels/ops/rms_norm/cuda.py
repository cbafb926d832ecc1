"""RMS norm and layer norm in CUDA C++: not there, so this backend refuses and says so."""

from __future__ import annotations

from hierkernels.ops.rms_norm.call import NormCall


def supports(call: NormCall) -> list[str]:
    """Always a reason: the CUDA core has no such kernel."""
    return ["the CUDA C++ core has no rms_norm kernel and no layer_norm kernel"]
