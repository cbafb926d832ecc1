"""Selected attention in CUDA C++: the compiled kernels of csrc/cuda/selected_attention."""

from __future__ import annotations

import torch

from hierkernels.cuda_core import core, device_reasons, on_device_of, stream_of
from hierkernels.ops.selected_attention.call import SelectedCall
from hierkernels.ops.selected_attention.work_items import work_items
from hierkernels.refusals import GPU_DTYPES, channel_reasons, dtype_reasons

MAX_DIM = 256
LEAST_ROWS = 256  # (query, head) pairs that are worth an item of work of the backward by keys
_SET = 16  # queries that may be computed together
_LEAST_TILE = 16  # keys


def supports(call: SelectedCall) -> list[str]:
    """Why the CUDA kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("q", call.q)
    reasons += dtype_reasons(call.q.dtype, GPU_DTYPES)
    reasons += channel_reasons(MAX_DIM, (("q", call.q), ("v", call.v)))
    Nk = call.k.shape[2]
    visited = call.columns * min(call.block_size, max(Nk, 1)) * _SET
    lists = call.indices.shape[:3].numel() * max(call.columns, 1)
    tiles = call.k.shape[:2].numel() * max(call.blocks, Nk // _LEAST_TILE)
    if max(visited, lists, tiles, Nk, call.q.shape[:3].numel()) >= 2**30:
        reasons.append("lengths or the number of named blocks beyond 32 bits")
    return reasons


def _words(t: torch.Tensor) -> torch.Tensor:
    """int32 as the core takes it, whose tensors know none."""
    return t.view(torch.float32)


def _arguments(call: SelectedCall) -> tuple:
    """Everything, as the core takes it."""
    q, k, v, indices, weights, *numbers = call.arguments()
    words = _words(indices) if indices.dtype == torch.int32 else indices
    return q, k, v, words, weights if indices.shape[3] else None, *numbers


def forward(call: SelectedCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse)."""
    out, lse = call.new_outputs()
    if call.sees_nothing:
        return out.zero_(), lse.fill_(float("-inf"))
    arguments = _arguments(call)
    with on_device_of(call.q):
        lists = lse.new_empty(core().cuda_selected_plan(arguments)[0])
        core().cuda_selected_forward(arguments, out, lse, lists, stream_of(call.q))
    return out, lse


def backward(
    call: SelectedCall,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    weights_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dweights or None)."""
    dq, dk, dv = call.new_gradients()
    dweights = call.new_weights_gradient().zero_() if weights_grad else None
    if call.sees_nothing:
        return dq.zero_(), dk.zero_(), dv.zero_(), dweights
    arguments, delta = _arguments(call), torch.empty_like(lse)
    with on_device_of(call.q):
        dlse = None if dlse is None else dlse.float().contiguous()
        parts = None
        if dweights is not None and dweights.numel():
            many = core().cuda_selected_weight_parts(arguments)
            parts = lse.new_zeros(many, dweights.numel())
        lists = lse.new_empty(core().cuda_selected_plan(arguments)[0])
        core().cuda_selected_backward_queries(
            arguments, out, lse, dout, dlse, dq, parts, lists, delta, stream_of(call.q)
        )
        if dweights is not None and parts is not None:
            dweights = (parts[0] if len(parts) == 1 else parts.sum(0)).view(dweights.shape)
        _backward_keys(call, arguments, (lse, delta, dout), dk, dv)
    return dq, dk, dv, dweights


def _backward_keys(
    call: SelectedCall,
    arguments: tuple,
    of_queries: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Fills dk and dv; of_queries: (lse, delta, dout)."""
    (lse, delta, dout), kernels, stream = of_queries, core(), stream_of(call.q)
    _, list_words, pairs, blocks, visits, keys, segments = kernels.cuda_selected_plan(arguments)
    lists = lse.new_empty(list_words)
    counts = lse.new_empty((pairs, blocks, segments), dtype=torch.int32)
    kernels.cuda_selected_count_visits(arguments, lists, _words(counts), stream)
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    offsets = (ends - counts.flatten()).view(counts.shape)
    starts = torch.cat((offsets[..., 0].flatten(), ends[-1:]))
    visitors = lse.new_empty((pairs * visits, 2))
    kernels.cuda_selected_place_visits(arguments, lists, _words(offsets), visitors, stream)

    choices = call.indices.shape[1] // call.k.shape[1]
    least = max(LEAST_ROWS * choices // call.group, 1)
    work = work_items(starts.diff().view(pairs, blocks), visits, choices * call.q.shape[2], least)
    parts = None
    if work.parts:
        parts = lse.new_empty((work.parts, keys, dk.shape[-1] + dv.shape[-1]))
    kernels.cuda_selected_backward_keys(
        arguments, lse, dout, dk, dv, delta, visitors, _words(starts), _words(work.item_block),
        _words(work.first_item), _words(work.first_part), parts, work.chunk, stream,
    )  # fmt: skip
