"""The inverse of the lists: for every block the queries that attend to it, cut into items of work.

A stable radix sort (a counting sort for each digit) of (block, query) pairs by block: the same
order at every run, without atomics. Nothing here waits for the device, so sizes are bounds that
depend on shapes alone.

An item is a block, or a chunk of a block that many queries selected. A chunk is four times the
average number of queries of a block, so that no program works much longer than the others, and so
that the partial sums take at most as much memory as dk and dv in float32, half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_CHUNK = 4  # times the average


@dataclass(frozen=True)
class Inverse:
    """All of it on the device; a pair is one batch and key/value head, J blocks of keys each."""

    rows: torch.Tensor  # (E,) int32, in order of the blocks: (b * index heads + head) * Nq + query
    weights: torch.Tensor | None  # (E,) float32, of the block in that query's list
    starts: torch.Tensor  # (pairs * J + 1,) int32: where the rows of each block begin
    first_item: torch.Tensor  # (pairs, J) int32: the block's first item, among those of the pair
    first_part: torch.Tensor  # (pairs, J) int32: its first partial sum, if it has several items
    item_block: torch.Tensor  # (pairs, items) int32: the block of each item, J if there is none
    chunk: int  # queries of an item at most
    parts: int  # partial sums of all pairs at most


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

    chunk = min(max(-(-_CHUNK * entries // blocks), least_chunk), entries)
    counts = starts.diff().view(pairs, blocks)
    chunks = (counts + chunk - 1).div(chunk, rounding_mode="floor").clamp(min=1)
    last_item = chunks.cumsum(1)
    items = blocks + entries // chunk
    item = torch.arange(items, device=lists.device).expand(pairs, items).contiguous()
    item_block = torch.searchsorted(last_item, item, right=True, out_int32=True)
    heavy = torch.where(chunks > 1, chunks, 0).flatten()
    return Inverse(
        rows=order.div(columns, rounding_mode="floor").int(),
        weights=sorted_weights,
        starts=starts,
        first_item=(last_item - chunks).int(),
        first_part=(heavy.cumsum(0) - heavy).int(),
        item_block=item_block,
        chunk=chunk,
        # A block of c > chunk queries has ceil(c / chunk) <= 2 c / chunk of them; none has more
        # queries than there are rows.
        parts=pairs * (2 * entries // chunk) if heads // kv_heads * Nq > chunk else 0,
    )
