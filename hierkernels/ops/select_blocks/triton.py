"""Block selection in Triton: the backend interface round the planned launch."""

from __future__ import annotations

import torch
import triton

from hierkernels.ops.select_blocks.call import SelectCall
from hierkernels.ops.select_blocks.triton_launch import plan, ranges
from hierkernels.refusals import GPU_DTYPES, channel_reasons, dtype_reasons
from hierkernels.triton_common.device import device_reasons, target_of

MAX_DIM = 256
MAX_SELECTED = 1024
# Whether the kernels are interpreted is settled when their modules are imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def supports(call: SelectCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("q", call.q, INTERPRETED)
    reasons += dtype_reasons(call.q.dtype, GPU_DTYPES)
    reasons += channel_reasons(MAX_DIM, (("q", call.q),))
    if min(call.num_selected, call.num_blocks) > MAX_SELECTED:
        reasons.append(f"more than {MAX_SELECTED} blocks are chosen")
    last = call.q.shape[2] + call.query_offset + call.block_size
    windows = call.k_cmp.shape[2] + call.num_blocks * call.windows_per_block
    chunks = windows + abs(call.first_chunk) + call.chunks_per_window
    if max(last, chunks, call.num_initial, call.num_local) >= 2**30 or ranges(call) is None:
        reasons.append("lengths or positions beyond 32 bits")
    return reasons


def forward(call: SelectCall) -> torch.Tensor:
    """indices (B, heads, Nq, n)."""
    indices = call.new_indices()
    if indices.numel() == 0:
        return indices
    if call.num_blocks == 0:
        return indices.fill_(-1)
    plan(call, target_of(call.q, INTERPRETED), indices).run()
    return indices
