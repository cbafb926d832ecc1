"""What the rows and columns of a tile stand for: all that the kernels know of packing.

A program owns rows of a slot. Row r of a slot is query r // PACK of head r % PACK, column c is
key c: one batch and PACK heads that share a key/value head (one head, with PACK = 1).

With SEVERAL, sequences are so short that a slot holds several of them, whole. An item is a batch
and a key/value head with all its query heads (PACK = GROUP); its rows follow those of the item
before, as do its columns, and the range of columns that a row sees is shifted by its item's place:
what is out of range and what belongs to others is masked by one comparison. A slot is one tile of
rows then.

A slot is the tuple (first item, rows, columns, heads, queries, keys), heads, queries and keys being
those of the whole call. A place is the tuple (batch, head, token) of a row or column, relative to
the batch and head that the program's pointers have been moved to: none with SEVERAL.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.triton_common.key_range import bound, key_spans

# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = [
    "dropout_threshold", "n_heads", "n_queries", "n_keys", "n_stats", "n_items", "items_of_slot",
    "n_parts", "n_records",
    "lo_shift", "lo_rise", "lo_offset", "lo_floor", "hi_shift", "hi_rise", "hi_offset", "hi_floor",
]  # fmt: skip


@triton.jit
def program_slot(
    program,
    tiled_rows,
    n_heads,
    n_queries,
    n_keys,
    n_items,
    items_of_slot,
    BLOCK_M: tl.constexpr,
    PACK: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """(first row, batch, head, number of the slot, slot) of a program that owns a tile of rows.

    program: its number among those that own rows; tiled_rows: rows of a slot that programs are for.
    Late rows go first: in causal patterns they see most keys.
    """
    if SEVERAL:
        first = program * items_of_slot
        items = tl.minimum(items_of_slot, n_items - first)
        slot = (first, items * n_queries * PACK, items * n_keys, n_heads, n_queries, n_keys)
        none = first * 0
        return none, none, none, program, slot
    else:
        tiles = tl.cdiv(tiled_rows, BLOCK_M)
        number = program // tiles
        m0 = (tiles - 1 - program % tiles) * BLOCK_M
        slots = n_heads // PACK
        slot = (0, n_queries * PACK, n_keys, n_heads, n_queries, n_keys)
        return m0, number // slots, number % slots * PACK, number, slot


@triton.jit
def row_places(rows, slot, PACK: tl.constexpr, SEVERAL: tl.constexpr):
    """(batch, head, query) of rows, in their shape."""
    if SEVERAL:
        token = rows // PACK
        item = slot[0] + token // slot[4]
        kv_heads = slot[3] // PACK
        return item // kv_heads, item % kv_heads * PACK + rows % PACK, token % slot[4]
    else:
        return 0, rows % PACK, rows // PACK


@triton.jit
def key_places(columns, slot, PACK: tl.constexpr, SEVERAL: tl.constexpr):
    """(batch, key/value head, key) of columns, in their shape."""
    if SEVERAL:
        item = slot[0] + columns // slot[5]
        kv_heads = slot[3] // PACK
        return item // kv_heads, item % kv_heads, columns % slot[5]
    else:
        return 0, 0, columns


@triton.jit
def same_item(rows, columns, slot, PACK: tl.constexpr, SEVERAL: tl.constexpr):
    """Whether rows and columns, whose shapes broadcast, exist and belong together."""
    inside = (rows < slot[1]) & (columns < slot[2])
    if SEVERAL:
        inside = inside & (rows // PACK // slot[4] == columns // slot[5])
    return inside


@triton.jit
def offsets(place, stride, PACK: tl.constexpr, SEVERAL: tl.constexpr):
    """int64 offsets of places; stride is (batch, head, token). Keys have PACK = 1."""
    at = place[2].to(tl.int64) * stride[2]
    if PACK > 1 or SEVERAL:
        at += place[1].to(tl.int64) * stride[1]
    if SEVERAL:
        at += place[0].to(tl.int64) * stride[0]
    return at


@triton.jit
def row_bound(rows, stairs, slot, PACK: tl.constexpr, SEVERAL: tl.constexpr):
    """The bound of the columns that rows see."""
    if SEVERAL:
        token = rows // PACK
        return bound(token % slot[4], stairs, slot[5]) + token // slot[4] * slot[5]
    else:
        return bound(rows // PACK, stairs, slot[5])


@triton.jit
def column_spans(
    m0,
    slot,
    lo_stairs,
    hi_stairs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """key_spans of a tile of rows; all columns with SEVERAL, every tile of which needs a mask."""
    if SEVERAL:
        none = slot[2] * 0
        return none, none, none, slot[2]
    else:
        first, last = m0 // PACK, (tl.minimum(m0 + BLOCK_M, slot[1]) - 1) // PACK
        return key_spans(first, last, lo_stairs, hi_stairs, slot[5], BLOCK_N)
