"""Items of work of a backward that goes by blocks of keys: a block, or a chunk of a popular one.

A chunk is four times the average number of visits of a block, so that no program works much longer
than the others, and so that the partial sums take at most as much memory as dk and dv in float32,
half of it. Nothing here waits for the device, so sizes are bounds that depend on shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_CHUNK = 4  # times the average


@dataclass(frozen=True)
class WorkItems:
    """All of it on the device; a pair is one batch and key/value head, J blocks of keys each."""

    first_item: torch.Tensor  # (pairs, J) int32: the block's first item, among those of the pair
    first_part: torch.Tensor  # (pairs, J) int32: its first partial sum, if it has several items
    item_block: torch.Tensor  # (pairs, items) int32: the block of each item, J if there is none
    chunk: int  # visits of an item at most
    parts: int  # partial sums of all pairs at most


def work_items(counts: torch.Tensor, visits: int, queries: int, least_chunk: int) -> WorkItems:
    """The items of blocks with these counts of visits (pairs, J).

    visits: of a pair, at most; queries: visits of a block, at most; least_chunk: visits that are
    worth an item.
    """
    pairs, blocks = counts.shape
    chunk = min(max(-(-_CHUNK * visits // blocks), least_chunk), visits)
    chunks = (counts + chunk - 1).div(chunk, rounding_mode="floor").clamp(min=1)
    last_item = chunks.cumsum(1)
    items = blocks + visits // chunk
    item = torch.arange(items, device=counts.device).expand(pairs, items).contiguous()
    heavy = torch.where(chunks > 1, chunks, 0).flatten()
    return WorkItems(
        first_item=(last_item - chunks).int(),
        first_part=(heavy.cumsum(0) - heavy).int().view(pairs, blocks),
        item_block=torch.searchsorted(last_item, item, right=True, out_int32=True),
        chunk=chunk,
        # A block of c > chunk visits has ceil(c / chunk) <= 2 c / chunk of them.
        parts=pairs * (2 * visits // chunk) if queries > chunk else 0,
    )
