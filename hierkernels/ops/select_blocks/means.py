"""Scoring by logits as scoring by products: of the mean query with each block's mean key."""

from __future__ import annotations

import torch

from hierkernels.ops.select_blocks.call import SelectCall


def mean_keys(call: SelectCall) -> torch.Tensor:
    """The blocks' mean keys (B, Hkv, J, D), whose products with q are the mean logits."""
    J, r = call.num_blocks, call.windows_per_block
    return call.k_cmp[:, :, : J * r].to(call.lse_dtype).unflatten(2, (J, r)).mean(3)


def mean_queries(call: SelectCall) -> torch.Tensor:
    """The mean of the queries that choose together, (B, heads, Nq, D)."""
    merged = call.q.shape[1] // call.heads
    if merged == 1:
        return call.q.to(call.lse_dtype)
    return call.q.unflatten(1, (-1, merged)).mean(2, dtype=call.lse_dtype)
