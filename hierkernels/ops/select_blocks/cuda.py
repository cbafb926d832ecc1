"""Block selection in CUDA C++: the compiled kernel of csrc/cuda/select_blocks."""

from __future__ import annotations

import torch

from hierkernels.cuda_core import core, device_reasons, on_device_of, stream_of
from hierkernels.ops.select_blocks.call import SelectCall
from hierkernels.ops.select_blocks.means import mean_keys, mean_queries
from hierkernels.refusals import GPU_DTYPES, channel_reasons, dtype_reasons

MAX_DIM = 256
MAX_SELECTED = 1024  # the lists of a block of threads fit shared memory
_TILE = 32  # blocks that are ranked at a time


def supports(call: SelectCall) -> list[str]:
    """Why the CUDA kernel cannot compute this call; empty if it can."""
    reasons = device_reasons("q", call.q)
    reasons += dtype_reasons(call.q.dtype, GPU_DTYPES)
    reasons += channel_reasons(MAX_DIM, (("q", call.q),))
    if min(call.num_selected, call.num_blocks) > MAX_SELECTED:
        reasons.append(f"more than {MAX_SELECTED} blocks are chosen")
    last = call.q.shape[2] + call.query_offset + call.block_size
    windows = call.k_cmp.shape[2] + (call.num_blocks + _TILE) * call.windows_per_block
    chunks = windows + abs(call.first_chunk) + call.chunks_per_window
    tiles = call.q.shape[:3].numel()
    if max(last, chunks, tiles, call.num_initial, call.num_local, call.num_selected) >= 2**30:
        reasons.append("lengths or positions beyond 32 bits")
    return reasons


def forward(call: SelectCall) -> torch.Tensor:
    """indices (B, heads, Nq, n)."""
    indices = call.new_indices()
    if indices.numel() == 0:
        return indices
    if call.num_blocks == 0:
        return indices.fill_(-1)
    q, k, visible, r, chunks, first_chunk = (
        call.q, call.k_cmp, call.visible.hi, call.windows_per_block, call.chunks_per_window,
        call.first_chunk,
    )  # fmt: skip
    if call.lse is None:  # a block is a window of its own
        q, k, visible, r = mean_queries(call), mean_keys(call), call.candidates.hi, 1
        chunks, first_chunk = 1, 0
    with on_device_of(call.q):
        core().cuda_select_blocks(
            q, k, call.lse, call.heads, visible, call.candidates.hi,
            (
                call.num_blocks, r, chunks, first_chunk, call.block_size, call.query_offset,
                call.num_selected, call.num_initial, call.num_local,
            ),
            call.exclude_own_block, call.scale,
            indices.view(torch.float32),  # words of 32 bits
            stream_of(call.q),
        )  # fmt: skip
    return indices
