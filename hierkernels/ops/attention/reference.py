"""Attention in eager PyTorch: the definition, and the oracle of every test.

Differentiable any number of times, for every dtype and device. Imports no kernel code.
"""

from __future__ import annotations

import torch
from einops import rearrange

from hierkernels.ops.attention.call import AttentionCall

_WORD = 0xFFFFFFFF


def philox_word(
    seed: int | torch.Tensor, i: torch.Tensor, j: torch.Tensor, h: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The 32 random bits of (query i, key j, head h, batch b), as int64; the inputs broadcast.

    Philox4x32-10 (Salmon et al., SC 2011), key = seed, counter = (j // 64 * 16 + j % 16, i, h, b);
    key j takes word j // 16 % 4.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(j // 64 * 16 + j % 16, i, h, b)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        p0, p1 = _wide_product(0xD2511F53, c0), _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = p1[0] ^ c1 ^ k0, p1[1], p0[0] ^ c3 ^ k1, p0[1]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack((c0, c1, c2, c3))
    return words.gather(0, (j // 16 % 4).expand_as(c0)[None])[0]


def _wide_product(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a * x for 32-bit a and x, without overflowing int64."""
    low, high = a * (x & 0xFFFF), a * (x >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_keep(call: AttentionCall) -> torch.Tensor:
    """Bool (B, Hq, Nq, Nk): True where a probability survives dropout."""
    assert call.seed is not None
    (B, H, Nq, _), Nk = call.q.shape, call.k.shape[2]
    device = call.q.device
    b = torch.arange(B, device=device)[:, None, None, None]
    h = torch.arange(H, device=device)[:, None, None]
    i = torch.arange(Nq, device=device)[:, None]
    j = torch.arange(Nk, device=device)
    threshold = min(int(call.dropout_p * 2**32), _WORD)
    return philox_word(call.seed, i, j, h, b) >= threshold


def supports(call: AttentionCall) -> list[str]:
    """The reference computes everything."""
    return []


def bias_slots(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, slot) of each pair in a bias by slots, (Nq, 1) and (Nq, Nk); slots may be outside."""
    i = torch.arange(call.q.shape[2], device=call.q.device)[:, None]
    j = torch.arange(call.k.shape[2], device=call.q.device)
    row = i % call.bias_width
    return row, j - (i - row) + call.bias_before


def _full_bias(call: AttentionCall) -> torch.Tensor:
    """The bias, broadcastable to the scores."""
    assert call.bias is not None
    if not call.bias_width:
        return call.bias
    row, slot = bias_slots(call)
    return call.bias[:, :, row, slot.clamp(0, call.bias.shape[3] - 1)]


def bias_gradient(call: AttentionCall, ds: torch.Tensor) -> torch.Tensor:
    """ds (B, Hq, Nq, Nk), 0 where hidden, summed over what shares an element of the bias."""
    assert call.bias is not None
    if not call.bias_width:
        return ds.sum_to_size(call.bias.shape)
    row, slot = bias_slots(call)
    width, slots = call.bias.shape[2:]
    at = (row * slots + slot.clamp(0, slots - 1)).flatten()
    flat = ds.new_zeros(1, ds.shape[1], width * slots)
    return flat.index_add_(2, at, ds.sum(0, keepdim=True).flatten(2)).unflatten(2, (width, slots))


def _scores(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled, soft-capped scores (B, Hq, Nq, Nk), and the same with the bias, -inf where hidden."""
    Hkv = call.k.shape[1]
    q = rearrange(call.q, "b (h g) n d -> b h g n d", h=Hkv)
    scores = torch.einsum("bhgid,bhjd->bhgij", q, call.k) * call.scale
    scores = rearrange(scores, "b h g i j -> b (h g) i j")
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    biased = scores if call.bias is None else scores + _full_bias(call).to(scores.dtype)
    visible = call.key_range.mask(scores.shape[2], scores.shape[3], scores.device)
    if call.mask is not None:
        visible = visible & call.mask
    if call.padding is not None:
        visible = visible & call.padding[:, None, None, :]
    biased = biased.to(call.lse_dtype)
    # A bias of -inf or of the least number hides a key as a mask does. (logsumexp alone would give
    # a row of -inf a NaN gradient.)
    hidden = ~visible | (biased < 0.9 * torch.finfo(call.lse_dtype).min)
    return scores, biased.masked_fill(hidden, float("-inf"))


def _probabilities(biased: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.exp(biased - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])


def attention(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), by the definition."""
    _, biased = _scores(call)
    # In two parts where all scores are huge: a float32 of -1e9 has no digits left for the logarithm
    # of the number of keys.
    large = torch.logsumexp(biased.detach(), -1)
    large = large.masked_fill((large.abs() < 2**16) | large.isinf(), 0.0)
    biased = biased - large[..., None]
    small = torch.logsumexp(biased, -1)
    p = _probabilities(biased, small)
    if call.dropout_p:
        p = p * dropout_keep(call) / (1 - call.dropout_p)
    p = rearrange(p.to(call.v.dtype), "b (h g) i j -> b h g i j", h=call.k.shape[1])
    out = torch.einsum("bhgij,bhjd->bhgid", p, call.v)
    return rearrange(out, "b h g n d -> b (h g) n d"), large + small


def forward(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """As every backend's forward: no graph, outputs in the canonical layout."""
    out, lse = call.new_outputs()
    for fresh, value in zip((out, lse), attention(call), strict=True):
        fresh.copy_(value)
    return out, lse


def backward(
    call: AttentionCall,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As every backend's backward, from the saved (out, lse): the formula that kernels follow."""
    scores, biased = _scores(call)
    p = _probabilities(biased, lse)
    keep = (
        dropout_keep(call).to(p.dtype) / (1 - call.dropout_p)
        if call.dropout_p
        else torch.ones_like(p[:1, :1])
    )
    per_kv_head = "b (h g) i d -> b h g i d"
    do = rearrange(dout, per_kv_head, h=call.k.shape[1])
    q = rearrange(call.q, per_kv_head, h=call.k.shape[1])
    dp = rearrange(torch.einsum("bhgid,bhjd->bhgij", do, call.v), "b h g i j -> b (h g) i j")
    delta = (out.to(p.dtype) * dout.to(p.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = p * (dp * keep - delta[..., None])
    dbias = None
    if bias_grad and call.bias is not None:
        dbias = bias_gradient(call, ds)
    if call.softcap:
        ds = ds * (1 - (scores / call.softcap) ** 2)
    ds = rearrange(ds * call.scale, per_kv_head, h=call.k.shape[1]).to(q.dtype)
    weights = rearrange(p * keep, per_kv_head, h=call.k.shape[1]).to(q.dtype)
    dq, dk, dv = call.new_gradients()
    dq.copy_(rearrange(torch.einsum("bhgij,bhjd->bhgid", ds, call.k), "b h g i d -> b (h g) i d"))
    dk.copy_(torch.einsum("bhgij,bhgid->bhjd", ds, q))
    dv.copy_(torch.einsum("bhgij,bhgid->bhjd", weights, do))
    return dq, dk, dv, dbias
