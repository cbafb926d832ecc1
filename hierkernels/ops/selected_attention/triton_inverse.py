"""The inverse of the lists: for every block the queries that attend to it, cut into items of work.

A stable radix sort (a counting sort for each digit) of (block, query) pairs by block: the same
order at every run, without atomics. Nothing here waits for the device, so sizes are bounds that
depend on shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hierkernels.ops.selected_attention.work_items import WorkItems, work_items


@dataclass(frozen=True)
class Inverse:
    """All of it on the device; a pair is one batch and key/value head, J blocks of keys each."""

    rows: torch.Tensor  # (E,) int32, in order of the blocks: (b * index heads + head) * Nq + query
    weights: torch.Tensor | None  # (E,) float32, of the block in that query's list
    starts: torch.Tensor  # (pairs * J + 1,) int32: where the rows of each block begin
    items: WorkItems


def invert(
    lists: torch.Tensor,
    weights: torch.Tensor | None,
    kv_heads: int,
    blocks: int,
    least_chunk: int,
) -> Inverse:
    """The inverse of lists (B, index heads, Nq, columns); weights: as the lists, if there are any.

    least_chunk: queries that are worth an item.
    """
    B, heads, Nq, columns = lists.shape
    pairs, entries = B * kv_heads, heads // kv_heads * Nq * columns
    wide = torch.int32 if pairs * blocks < 2**31 - 1 else torch.int64
    number = torch.arange(pairs * blocks + 1, dtype=wide, device=lists.device)
    pair = number[:pairs].view(B, kv_heads, 1) * blocks
    by_pair = lists.view(B, kv_heads, -1)
    key = torch.where(by_pair >= 0, by_pair + pair, pairs * blocks).flatten()
    ordered, order = key.sort(stable=True)
    starts = torch.searchsorted(ordered, number, out_int32=True)
    sorted_weights = None if weights is None else weights.flatten()[order]

    return Inverse(
        rows=order.div(columns, rounding_mode="floor").int(),
        weights=sorted_weights,
        starts=starts,
        items=work_items(
            starts.diff().view(pairs, blocks), entries, heads // kv_heads * Nq, least_chunk
        ),
    )
