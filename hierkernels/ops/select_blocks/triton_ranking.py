"""A running list of the best blocks in registers, merged with a tile of scores at a time.

A block and its score are one int64: the score's bits, in an order that integers have as well, and
below them the block's number, negated, so that of equal scores the lower block is larger. A maximum
over a row then finds both at once, and no two entries are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = tl.constexpr(-(2**63))  # what is no candidate
_MOST = tl.constexpr(2**63 - 1)  # a column that is never used
_NO_BLOCK = tl.constexpr(2**31 - 1)


@triton.jit
def _ordered(bits):
    """Bits of float32 as an int32 in the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def best_blocks(n_selected, BLOCK_M: tl.constexpr, BLOCK_TOP: tl.constexpr):
    """An empty list, [BLOCK_M, BLOCK_TOP], with room for n_selected blocks."""
    column = tl.arange(0, BLOCK_TOP)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
    return tl.where(column < n_selected, column.to(tl.int64) + (_LEAST + 1), _MOST)


@triton.jit
def merge(best, scores, blocks, allowed):
    """The best of the list and of the scores [BLOCK_M, BLOCK_N] of these blocks [BLOCK_N].

    A round moves the best score left of each row into the list, in the place of the worst there,
    until no row has one that is better. So few rounds are needed once the list holds good blocks.
    """
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 is 0
    keys = (_ordered(bits).to(tl.int64) << 32) + (blocks ^ _NO_BLOCK)[None, :].to(tl.int64)
    keys = tl.where(allowed, keys, _LEAST)
    first = tl.max(keys, 1)
    worst = tl.min(best, 1)
    rounds = tl.max((first > worst).to(tl.int32), 0)
    while rounds > 0:
        replaced = (best == worst[:, None]) & (first > worst)[:, None]
        best = tl.where(replaced, first[:, None], best)
        keys = tl.where(keys == first[:, None], _LEAST, keys)
        first = tl.max(keys, 1)
        worst = tl.min(best, 1)
        rounds = tl.max((first > worst).to(tl.int32), 0)
    return best


@triton.jit
def score_of(best):
    """The scores in a list; NaN where it holds no block."""
    return _ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def store_ascending(indices_at, best, kept, rows, n_queries, n_selected, BLOCK_TOP: tl.constexpr):
    """Stores the blocks of a list that are kept, in ascending order, then -1.

    indices_at: of query 0; a query has n_selected indices.
    """
    # An empty place has a score below all others.
    is_block = (best > _LEAST + BLOCK_TOP) & (best != _MOST) & kept
    blocks = tl.where(is_block, best.to(tl.int32) ^ _NO_BLOCK, _NO_BLOCK)
    at = indices_at + rows.to(tl.int64) * n_selected
    for c in range(n_selected):
        block = tl.min(blocks, 1)
        tl.store(at + c, tl.where(block == _NO_BLOCK, -1, block), mask=rows < n_queries)
        blocks = tl.where(blocks == block[:, None], _NO_BLOCK, blocks)
