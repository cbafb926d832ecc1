"""Local attention in eager PyTorch: the definition, and the oracle of every test.

Differentiable any number of times, for every dtype and device. Imports no kernel code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hierkernels.ops.attention.reference import philox_word
from hierkernels.ops.local_attention.call import LocalCall


def local_attention(call: LocalCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), by the definition: a dense score matrix."""
    a, w, before = call.attention, call.width, call.before
    (B, H, N, _), device = a.q.shape, a.q.device
    zeros = before if call.zero_lookback else 0  # keys in front of the sequence
    k, v = (F.pad(t.repeat_interleave(a.group, 1), (0, 0, zeros, 0)) for t in (a.k, a.v))
    i = torch.arange(N, device=device)[:, None]
    j = torch.arange(-zeros, N, device=device)

    bucket = i // w * w  # its first position
    lo = (i if call.exact_window else bucket) - before
    hi = (i if call.exact_window else bucket + w - 1) + call.look_forward * w
    visible = (lo <= j) & (j <= (i if call.is_causal else hi))
    if a.padding is not None:
        visible = visible & F.pad(a.padding, (zeros, 0), value=True)[:, None, None, :]

    scores = torch.einsum("bhid,bhjd->bhij", a.q, k) * a.scale
    if a.bias is not None:
        slot = (j - bucket + before).clamp(0, a.bias.shape[3] - 1)
        scores = scores + a.bias[:, :, i % w, slot].to(scores.dtype)
    scores = scores.to(a.lse_dtype)
    # A bias of -inf hides a key as a mask does.
    scores = scores.masked_fill(~visible | (scores == float("-inf")), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    if a.dropout_p:
        assert a.seed is not None
        b, h = (torch.arange(n, device=device)[:, None, None] for n in (B, H))
        word = philox_word(a.seed, i, j.clamp(min=0), h, b[:, None])
        p = p * (word >= min(int(a.dropout_p * 2**32), 0xFFFFFFFF)) / (1 - a.dropout_p)
    return torch.einsum("bhij,bhjd->bhid", p.to(v.dtype), v), lse
