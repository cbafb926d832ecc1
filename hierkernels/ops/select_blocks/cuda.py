"""Block selection in CUDA C++: not there, so this backend refuses and says so."""

from __future__ import annotations

from hierkernels.ops.select_blocks.call import SelectCall


def supports(call: SelectCall) -> list[str]:
    """Always a reason: the CUDA core has no such kernel."""
    return ["the CUDA C++ core has no select_blocks kernel"]
