"""Attention on the CPU: the compiled key-range kernels of csrc/cpu/attention."""

from __future__ import annotations

import torch

from hierkernels.native import native
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.refusals import cpu_reasons

MAX_DIM = 512
MAX_LENGTH = 2**31 - 2**16  # positions are 32-bit integers, up to a tile beyond the last


def supports(call: AttentionCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    reasons = cpu_reasons("q", call.q)
    (_, _, Nq, D), (_, _, Nk, Dv) = call.q.shape, call.v.shape
    if D > MAX_DIM or Dv > MAX_DIM:
        reasons.append(f"head channels above {MAX_DIM}")
    for n, name in ((Nq, "queries"), (Nk, "keys")):
        if n > MAX_LENGTH:
            reasons.append(f"{n} {name}, at most {MAX_LENGTH} are supported")
    return reasons


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse)."""
    out, lse = call.new_outputs()
    native().attention_forward(*call.arguments(), out, lse)
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
    q = call.q
    dq, dk, dv = call.new_gradients()
    dbias = None
    if bias_grad:
        assert call.bias is not None
        # What is stored once, not summed, needs no wider type than its own.
        narrow = call.bias_of_pairs and call.bias.element_size() == 2 and q.dtype != torch.float64
        dbias = torch.empty(call.bias.shape, dtype=call.bias.dtype if narrow else call.lse_dtype)
    dlse = dlse.to(call.lse_dtype).contiguous() if dlse is not None else None
    native().attention_backward(*call.arguments(), out, lse, dout, dlse, dq, dk, dv, dbias)
    return dq, dk, dv, dbias
