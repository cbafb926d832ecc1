"""GELU in CUDA C++: not there, so this backend refuses and says so."""

from __future__ import annotations

from hierkernels.ops.gelu.call import GeluCall


def supports(call: GeluCall) -> list[str]:
    """Always a reason: the CUDA core has no such kernel."""
    return ["the CUDA C++ core has no gelu kernel"]
