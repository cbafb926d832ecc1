"""Selected attention in eager PyTorch: the definition, and the oracle of every test.

Differentiable any number of times, for every dtype and device. Imports no kernel code. Its time and
memory grow with Nq Nk: the choice of blocks is a mask over all keys.
"""

from __future__ import annotations

import torch
from einops import rearrange

from hierkernels.ops.selected_attention.call import SelectedCall


def supports(call: SelectedCall) -> list[str]:
    """The reference computes everything."""
    return []


def positions(call: SelectedCall) -> torch.Tensor:
    """p = i + Nk - Nq of each query, (Nq)."""
    return torch.arange(call.q.shape[2], device=call.q.device) + call.first_position


def named_blocks(call: SelectedCall) -> torch.Tensor:
    """The blocks as named, (B, Hkv or Hq, Nq, n), int64: J for none, for later namings too.

    With the own block there are n + 1, the last of which is the own block.
    """
    named, none = call.indices.long(), call.blocks
    if call.include_own_block:
        p = positions(call)
        own = torch.where(p >= 0, p.clamp(min=0) // call.block_size, none)
        named = torch.cat((named, own[:, None].expand(*named.shape[:3], 1)), -1)
    named = torch.where((named >= 0) & (named < none), named, none)
    again = (named[..., :, None] == named[..., None, :]).tril(-1).any(-1)
    return named.masked_fill(again, none)


def _by_block(call: SelectedCall, named: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The value of each block, 0 unless it is named; (B, Hkv or Hq, Nq, J)."""
    table = values.new_zeros(*named.shape[:3], call.blocks + 1)
    return table.scatter(-1, named, values)[..., : call.blocks]


def _by_key(call: SelectedCall, table: torch.Tensor) -> torch.Tensor:
    """A table over blocks, (B, Hkv or Hq, Nq, J), as one over keys, (B, Hq, Nq, Nk)."""
    keys = torch.arange(call.k.shape[2], device=table.device)
    by_key = table[..., keys // call.block_size]
    return by_key.repeat_interleave(call.q.shape[1] // table.shape[1], dim=1)


def visible(call: SelectedCall) -> torch.Tensor:
    """Bool (B, Hq, Nq, Nk): the keys that each query attends to."""
    named = named_blocks(call)
    seen = _by_key(call, _by_block(call, named, torch.ones_like(named)) > 0)
    if call.is_causal:
        keys = torch.arange(call.k.shape[2], device=seen.device)
        seen = seen & (keys <= positions(call)[:, None])
    return seen


def key_weights(call: SelectedCall) -> torch.Tensor | None:
    """The weight of each key's block, (B, Hq, Nq, Nk), in the dtype of the weights."""
    if call.weights is None:
        return None
    weights = call.weights
    if call.include_own_block:
        weights = torch.cat((weights, weights.new_ones(*weights.shape[:3], 1)), -1)
    return _by_key(call, _by_block(call, named_blocks(call), weights))


def _products(call: SelectedCall) -> torch.Tensor:
    """scale * q . k, (B, Hq, Nq, Nk)."""
    q = rearrange(call.q, "b (h g) n d -> b h g n d", h=call.k.shape[1])
    scores = torch.einsum("bhgid,bhjd->bhgij", q, call.k) * call.scale
    return rearrange(scores, "b h g i j -> b (h g) i j")


def masked_scores(call: SelectedCall) -> torch.Tensor:
    """The scores (B, Hq, Nq, Nk) in the precision of lse, -inf where not selected."""
    scores, weights = _products(call), key_weights(call)
    if weights is not None:
        scores = scores * weights.to(scores.dtype)
    return scores.to(call.lse_dtype).masked_fill(~visible(call), float("-inf"))


def probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse), 0 in rows that see nothing."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])


def selected_attention(call: SelectedCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), by the definition."""
    scores = masked_scores(call)
    lse = torch.logsumexp(scores, -1)
    p = probabilities(scores, lse).to(call.v.dtype)
    p = rearrange(p, "b (h g) i j -> b h g i j", h=call.k.shape[1])
    out = torch.einsum("bhgij,bhjd->bhgid", p, call.v)
    return rearrange(out, "b h g n d -> b (h g) n d"), lse


def forward(call: SelectedCall) -> tuple[torch.Tensor, torch.Tensor]:
    """As every backend's forward: no graph, outputs in the canonical layout."""
    out, lse = call.new_outputs()
    for fresh, value in zip((out, lse), selected_attention(call), strict=True):
        fresh.copy_(value)
    return out, lse


def backward(
    call: SelectedCall,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    weights_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As every backend's backward, from the saved (out, lse): the formula that kernels follow."""
    per_kv_head = "b (h g) i d -> b h g i d"
    kv_heads = call.k.shape[1]
    p = probabilities(masked_scores(call), lse)
    q, do = (rearrange(t, per_kv_head, h=kv_heads) for t in (call.q, dout))
    dp = rearrange(torch.einsum("bhgid,bhjd->bhgij", do, call.v), "b h g i j -> b (h g) i j")
    delta = (out.to(p.dtype) * dout.to(p.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = p * (dp - delta[..., None])
    dweights = None
    if weights_grad:
        dweights = weights_gradient(call, ds * _products(call))
    weights = key_weights(call)
    if weights is not None:
        ds = ds * weights.to(ds.dtype)
    ds = rearrange(ds * call.scale, per_kv_head, h=kv_heads).to(q.dtype)
    p = rearrange(p, per_kv_head, h=kv_heads).to(q.dtype)
    dq, dk, dv = call.new_gradients()
    dq.copy_(rearrange(torch.einsum("bhgij,bhjd->bhgid", ds, call.k), "b h g i d -> b (h g) i d"))
    dk.copy_(torch.einsum("bhgij,bhgid->bhjd", ds, q))
    dv.copy_(torch.einsum("bhgij,bhgid->bhjd", p, do))
    return dq, dk, dv, dweights


def weights_gradient(call: SelectedCall, terms: torch.Tensor) -> torch.Tensor:
    """terms (B, Hq, Nq, Nk) summed over the keys and heads that share a weight: as the weights."""
    B, heads, Nq, n = call.indices.shape
    terms = rearrange(terms, "b (h g) i j -> b h g i j", h=heads).sum(2)
    blocks = torch.arange(call.k.shape[2], device=terms.device) // call.block_size
    sums = terms.new_zeros(B, heads, Nq, call.blocks + 1).index_add_(3, blocks, terms)
    return sums.gather(-1, named_blocks(call)[..., :n])
