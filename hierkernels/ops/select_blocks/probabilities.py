"""The probabilities of chosen blocks, differentiable, from the log-sum-exp of hk.attention."""

from __future__ import annotations

import math

import torch

from hierkernels.key_range import KeyRange, Staircase
from hierkernels.ops.attention import api as attention
from hierkernels.ops.select_blocks.call import NO_BLOCK_LOGIT, SelectCall


def _ranges(call: SelectCall) -> list[KeyRange]:
    """The candidates; two ranges where the own block is a hole."""
    if not call.own_block_is_a_hole:
        return [call.candidates]
    S, offset = call.block_size, call.query_offset
    end = call.candidates.hi
    before = KeyRange(Staircase(), Staircase(offset, S, 1, 0))
    return [before.canonical(), KeyRange(Staircase(offset, S, 1, 1), end).canonical()]


def probabilities(
    call: SelectCall,
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    indices: torch.Tensor,
    backend: str | None,
) -> torch.Tensor:
    """p (B, heads, Nq, n) of the indices: softmax over the candidates and the logit of no block.

    q and k_cmp are the call's, with their graphs. No (Nq x J) tensor is made: the softmax's sum
    comes from attention over the blocks' mean keys.
    """
    J, r = call.num_blocks, call.windows_per_block
    q, k = q.to(call.lse_dtype), k_cmp.to(call.lse_dtype)
    k = k[:, :, : J * r].unflatten(2, (J, r)).mean(3)  # (B, Hkv, J, D)
    if call.shared:
        q = q.unflatten(1, (-1, call.group)).mean(2)
    total = q.new_full(q.shape[:3], NO_BLOCK_LOGIT)
    for key_range in _ranges(call):
        blocks = attention.make_call(q, k, k[..., :1], scale=call.scale, key_range=key_range)
        total = torch.logaddexp(total, attention.run(blocks, backend)[1])
    if not call.shared:
        k = k.repeat_interleave(call.group, 1)
    B, H, N, n = indices.shape
    if J == 0:  # nothing to gather from
        return torch.exp(q.new_full(indices.shape, -math.inf) - total[..., None])
    at = indices.clamp(min=0).flatten(2).long()[..., None].expand(B, H, N * n, k.shape[3])
    scores = torch.einsum("bhid,bhind->bhin", q, k.gather(2, at).unflatten(2, (N, n))) * call.scale
    # Hidden before the exponential: one that overflows would have the gradient 0 * inf.
    return (scores - total[..., None]).masked_fill(indices < 0, -torch.inf).exp()
