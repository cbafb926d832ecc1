"""Selected attention on the CPU: the compiled kernels of csrc/cpu/selected_attention."""

from __future__ import annotations

from hierkernels.ops.selected_attention.call import SelectedCall


def supports(call: SelectedCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    return ["the compiled core has no kernel for selected blocks yet"]
