"""Selected attention in Triton: the backend interface round the planned launches."""

from __future__ import annotations

import torch
import triton

from hierkernels.ops.selected_attention import triton_launch as plans
from hierkernels.ops.selected_attention.call import SelectedCall
from hierkernels.refusals import GPU_DTYPES, channel_reasons, dtype_reasons
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.launch import Launch

MAX_DIM = 256
MAX_GROUP = 128
# Whether the kernels are interpreted is settled when their modules are imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def supports(call: SelectedCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("q", call.q, INTERPRETED)
    reasons += dtype_reasons(call.q.dtype, GPU_DTYPES)
    reasons += channel_reasons(MAX_DIM, (("q", call.q), ("v", call.v)))
    B, heads, Nq, _ = call.indices.shape
    if heads and call.q.shape[1] // heads > MAX_GROUP:
        reasons.append(f"more than {MAX_GROUP} query heads share a choice of blocks")
    Nk, columns = call.k.shape[2], call.columns
    named_keys = columns * min(call.block_size, 2 * max(Nk, 1))
    items = 2 * B * call.k.shape[1] * (call.blocks + Nk // 16)
    rows = call.q.shape[:3].numel()
    if max(B * heads * Nq * max(columns, 1), Nk, rows, named_keys, items) >= 2**30:
        reasons.append("lengths or the number of named blocks beyond 32 bits")
    return reasons


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def forward(call: SelectedCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse)."""
    out, lse = call.new_outputs()
    if call.sees_nothing:
        return out.zero_(), lse.fill_(float("-inf"))
    _run(plans.plan_forward(call, target_of(call.q, INTERPRETED), out, lse))
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
    target = target_of(call.q, INTERPRETED)
    given = dout, None if dlse is None else dlse.contiguous()
    launches, lists, stats = plans.plan_queries(call, target, (out, lse), given, dq, dweights)
    _run(launches)
    inverse = plans.inverse_of(call, target, lists)
    _run(plans.plan_keys(call, target, inverse, stats, dout, dk, dv))
    return dq, dk, dv, dweights
