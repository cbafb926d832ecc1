"""Compressed attention in eager PyTorch: the definition, and the oracle of every test.

Differentiable any number of times, for every dtype and device. Imports no kernel code.
"""

from __future__ import annotations

import torch

from hierkernels.ops.compressed_attention.call import CompressedCall


def compressed_attention(call: CompressedCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), by the definition: a dense score matrix."""
    a = call.attention
    k, v = (t.repeat_interleave(a.group, 1) for t in (a.k, a.v))
    scores = (torch.einsum("bhid,bhjd->bhij", a.q, k) * a.scale).to(a.lse_dtype)
    if call.is_causal:
        position = torch.arange(a.q.shape[2], device=a.q.device)[:, None] + call.query_offset
        window = torch.arange(a.k.shape[2], device=a.q.device) - call.num_memory
        end = call.first_end + window * call.stride
        visible = (window < 0) | ((end < position) if call.strict else (end <= position))
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return torch.einsum("bhij,bhjd->bhid", p.to(v.dtype), v), lse
