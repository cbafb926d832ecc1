"""Block selection in eager PyTorch: the definition, and the oracle of every test.

For every dtype and device; scores are float32 (float64 for float64). Imports no kernel code.
"""

from __future__ import annotations

import math

import torch

from hierkernels.ops.select_blocks.call import LEAST_PROBABILITY, NO_BLOCK_LOGIT, SelectCall


def supports(call: SelectCall) -> list[str]:
    """The reference computes everything."""
    return []


def positions(call: SelectCall) -> torch.Tensor:
    """(Nq, 1): where the queries stand."""
    return torch.arange(call.q.shape[2], device=call.q.device)[:, None] + call.query_offset


def visible_windows(call: SelectCall) -> torch.Tensor:
    """Bool (Nq, W): windows that have ended at, or with strict before, the query's position."""
    W = call.k_cmp.shape[2]
    end = call.first_end + torch.arange(W, device=call.q.device) * call.stride
    p = positions(call)
    if not call.is_causal:
        return (end > -1).expand(p.shape[0], W)
    return end < p if call.strict else end <= p


def candidate_blocks(call: SelectCall) -> torch.Tensor:
    """Bool (Nq, J): the blocks that may be chosen."""
    p, J, S = positions(call), call.num_blocks, call.block_size
    j = torch.arange(J, device=call.q.device)
    if call.lse is None:  # all windows of the block are visible
        r = call.windows_per_block
        found = visible_windows(call)[:, : J * r].unflatten(1, (J, r)).all(2)
    else:  # the block has begun
        found = j * S <= p if call.is_causal else (j >= 0).expand(p.shape[0], J)
    return found & (j != p // S) if call.exclude_own_block else found


def forced_blocks(call: SelectCall) -> torch.Tensor:
    """Bool (Nq, J): the first num_initial blocks, and the last num_local up to the own one."""
    j, own = torch.arange(call.num_blocks, device=call.q.device), positions(call) // call.block_size
    local = (j > own - call.num_local) & (j <= own)
    return ((j < call.num_initial) | local) & candidate_blocks(call)


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    with torch.autocast(q.device.type, enabled=False):  # it would round what was made float32
        return torch.einsum("bhid,bhjd->bhij", q, k)


def logits(call: SelectCall) -> torch.Tensor:
    """scale * mean over the group's q . mean over the block's k, (B, heads, Nq, J)."""
    q, k = call.q.to(call.lse_dtype), call.k_cmp.to(call.lse_dtype)
    J, r = call.num_blocks, call.windows_per_block
    k = k[:, :, : J * r].unflatten(2, (J, r)).mean(3)
    if call.shared:
        q = q.unflatten(1, (-1, call.group)).mean(2)
    else:
        k = k.repeat_interleave(call.group, 1)
    return _products(q, k) * call.scale


def probability_sums(call: SelectCall, terms: torch.Tensor | None = None) -> torch.Tensor:
    """The probabilities of the windows, once for each chunk in the block, (B, heads, Nq, J).

    `terms` (B, Hq, Nq, W) takes the place of the probabilities, for tests.
    """
    if terms is None:
        assert call.lse is not None
        q, k = call.q.to(call.lse_dtype), call.k_cmp.to(call.lse_dtype)
        scores = _products(q, k.repeat_interleave(call.group, 1))
        terms = torch.exp(scores * call.scale - call.lse[..., None])
    p = terms.masked_fill(~visible_windows(call), 0.0)
    if call.shared:
        p = p.unflatten(1, (-1, call.group)).sum(2)
    sums = p.new_zeros(*p.shape[:3], call.num_blocks)
    w = torch.arange(p.shape[3], device=p.device)
    for m in range(call.chunks_per_window):
        chunk = w + call.first_chunk + m
        block = chunk.div(call.windows_per_block, rounding_mode="floor")
        inside = (block >= 0) & (block < call.num_blocks)
        sums.index_add_(3, block[inside], p[..., inside])
    return sums


def rank(scores: torch.Tensor, allowed: torch.Tensor, n: int) -> torch.Tensor:
    """The n allowed indices of the highest scores, ties to the lower index; -1 for none."""
    scores = scores.masked_fill(~allowed, -math.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    order = order.masked_fill(~allowed.expand_as(scores).gather(-1, order), -1)
    return torch.nn.functional.pad(order, (0, n - order.shape[-1]), value=-1)


def ascending(chosen: torch.Tensor) -> torch.Tensor:
    """Indices in ascending order, int32, -1s last."""
    last = 2**31 - 1
    found = chosen.masked_fill(chosen < 0, last).sort(dim=-1).values
    return found.masked_fill(found == last, -1).to(torch.int32)


@torch.no_grad()
def forward(call: SelectCall) -> torch.Tensor:
    """indices (B, heads, Nq, n), by the definition: dense scores. A score that is NaN counts as
    the least one."""
    allowed, n = candidate_blocks(call), call.num_selected
    if call.lse is not None:
        scores = probability_sums(call).nan_to_num(nan=0.0)  # infinity becomes the largest number
        scores = scores.masked_fill(forced_blocks(call), math.inf)
        return ascending(rank(scores, allowed, n))
    scores = logits(call).masked_fill(~allowed, -math.inf)
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    column = scores.new_full((*scores.shape[:3], 1), NO_BLOCK_LOGIT)
    total = torch.logsumexp(torch.cat((column, scores), 3), 3, keepdim=True)
    return ascending(rank(scores, torch.exp(scores - total) > LEAST_PROBABILITY, n))
