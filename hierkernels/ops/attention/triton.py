"""Attention in Triton: the backend interface round the planned launches of triton_launch.py."""

from __future__ import annotations

import torch
import triton

from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.triton_launch import plan_backward, plan_forward
from hierkernels.refusals import GPU_DTYPES, channel_reasons, dtype_reasons
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.key_range import range_arguments

MAX_DIM = 256
# Whether the kernels are interpreted is settled when their modules are imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def supports(call: AttentionCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("q", call.q, INTERPRETED)
    reasons += dtype_reasons(call.q.dtype, GPU_DTYPES)
    reasons += channel_reasons(MAX_DIM, (("q", call.q), ("v", call.v)))
    Nq, Nk = call.q.shape[2], call.k.shape[2]
    rows = Nq * max(call.group, 1)
    if max(rows, Nk) >= 2**31 - 2**16 or range_arguments(call.key_range, Nq, Nk) is None:
        reasons.append("lengths or key range beyond 32 bits")
    # Programs are numbered in 32 bits; tiles have 16 rows or keys at least.
    if call.q.shape[0] * call.q.shape[1] * (max(rows, Nk) // 16 + 1) >= 2**31:
        reasons.append("more than 2**31 programs")
    return reasons


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse)."""
    out, lse = call.new_outputs()
    if out.numel() == 0 or call.k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    for launch in plan_forward(call, target_of(call.q, INTERPRETED), out, lse):
        launch.run()
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
    dlse = None if dlse is None else dlse.contiguous()
    launches, partial = plan_backward(
        call, target_of(call.q, INTERPRETED), out, lse, dout, dlse, (dq, dk, dv), bias
    )
    for launch in launches:
        launch.run()
    if bias is None or partial is None:
        return dq, dk, dv, None
    return dq, dk, dv, partial.sum_to_size(bias.shape)
