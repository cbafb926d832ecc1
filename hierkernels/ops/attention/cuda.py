"""Attention in CUDA C++: the compiled key-range kernels of csrc/cuda/attention."""

from __future__ import annotations

import torch

from hierkernels.cuda_core import (
    core,
    device_reasons,
    multiprocessors_of,
    on_device_of,
    stream_of,
)
from hierkernels.key_parts import count_parts
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.refusals import GPU_DTYPES, channel_reasons, dtype_reasons

MAX_DIM = 256
MAX_LENGTH = 2**31 - 2**16  # rows and keys are 32-bit integers, up to a tile beyond the last
_MOST_ROWS = 128  # from so many on, kernels for sm_90a may compute a call
_MIN_TILE = 16  # rows or keys; there are at most 2**31 - 1 blocks


def supports(call: AttentionCall) -> list[str]:
    """Why the CUDA kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("q", call.q)
    reasons += dtype_reasons(call.q.dtype, GPU_DTYPES)
    reasons += channel_reasons(MAX_DIM, (("q", call.q), ("v", call.v)))
    B, _, Nq, _ = call.q.shape
    _, Hkv, Nk, _ = call.k.shape
    for n, name in ((Nq * call.group, "queries of a key/value head"), (Nk, "keys")):
        if n > MAX_LENGTH:
            reasons.append(f"{n} {name}, at most {MAX_LENGTH} are supported")
    if B * Hkv * (max(Nq * call.group, Nk) // _MIN_TILE + 1) >= 2**31:
        reasons.append("more tiles than a launch can have")
    return reasons


def _records(call: AttentionCall, lse: torch.Tensor) -> torch.Tensor | None:
    """Memory for what blocks leave that share the keys of a tile; None if none do."""
    (B, _, Nq, _), (Hkv, Nk) = call.q.shape, call.k.shape[1:3]
    rows = Nq * call.group
    if rows >= _MOST_ROWS:
        return None
    lo, hi = call.key_range
    keys = max(hi.at_query(Nq - 1, Nk) - lo.at_query(0, Nk), 0)
    parts = count_parts(multiprocessors_of(call.q), B * Hkv, rows, keys)
    return None if parts == 1 else lse.new_empty(parts, lse.numel() * (call.v.shape[3] + 2))


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse)."""
    out, lse = call.new_outputs()
    if out.numel() == 0 or call.k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    with on_device_of(call.q):
        records = _records(call, lse)
        core().cuda_attention_forward(*call.arguments(), out, lse, records, stream_of(call.q))
    return out, lse


def backward(
    call: AttentionCall,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dbias or None)."""
    dq, dk, dv = call.new_gradients()
    bias = call.bias if bias_grad else None
    if out.numel() == 0 or call.k.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), None if bias is None else torch.zeros_like(bias)
    dlse = None if dlse is None else dlse.float().contiguous()
    delta = torch.empty_like(lse)
    parts = None
    if bias is not None:
        slices = core().cuda_attention_bias_slices(*call.arguments())
        parts = lse.new_empty(slices, bias.numel())
    with on_device_of(call.q):
        core().cuda_attention_backward(
            *call.arguments(), out, lse, dout, dlse, dq, dk, dv, parts, delta, stream_of(call.q)
        )
    dbias = None
    if bias is not None and parts is not None:
        dbias = (parts[0] if len(parts) == 1 else parts.sum(0)).view(bias.shape)
    return dq, dk, dv, dbias
