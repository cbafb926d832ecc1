"""Block selection on the CPU: the compiled kernels of csrc/cpu/select_blocks."""

from __future__ import annotations

import torch

from hierkernels.native import native
from hierkernels.ops.select_blocks.call import SelectCall
from hierkernels.ops.select_blocks.means import mean_keys
from hierkernels.refusals import cpu_reasons

MAX_LENGTH = 2**31 - 2**16  # positions are 32-bit integers


def supports(call: SelectCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    reasons = cpu_reasons("q", call.q)
    if call.q.shape[2] + call.query_offset > MAX_LENGTH:
        reasons.append(f"positions beyond {MAX_LENGTH}")
    return reasons


def forward(call: SelectCall) -> torch.Tensor:
    """indices."""
    indices = call.new_indices()
    k, visible, r, chunks, first_chunk = (
        call.k_cmp, call.visible.hi, call.windows_per_block, call.chunks_per_window,
        call.first_chunk,
    )  # fmt: skip
    if call.lse is None:  # a block is a window of its own
        k, visible, r, chunks, first_chunk = mean_keys(call), call.candidates.hi, 1, 1, 0
    native().select_blocks(
        call.q, k, call.lse, call.heads, visible, call.candidates.hi,
        (
            call.num_blocks, r, chunks, first_chunk, call.block_size, call.query_offset,
            call.num_selected, call.num_initial, call.num_local,
        ),
        call.exclude_own_block, call.scale, indices.data_ptr(),
    )  # fmt: skip
    return indices
