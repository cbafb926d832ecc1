"""Selected attention in CUDA C++: not there yet, so this backend refuses and says so."""

from __future__ import annotations

from hierkernels.ops.selected_attention.call import SelectedCall


def supports(call: SelectedCall) -> list[str]:
    """Always a reason: the CUDA core has no kernel for it."""
    return ["the CUDA C++ core has no kernel for selected blocks; backend='triton' has"]
