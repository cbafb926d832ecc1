"""What the kernels of selected attention share: the lists of blocks, and the keys of a tile.

A list has a column for each block that a query attends to, in the order of the call's indices;
with OWN = 1 (else 0) the query's own block comes before them. -1 is a column without a block: not
named, out of range, named before, wholly in the future. So the other kernels read lists and check
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.triton_common.tiles import dot, load_rows, store_rows

# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = [
    "n_rows", "n_heads", "n_queries", "n_keys", "n_columns", "n_blocks", "first_position",
    "n_parts", "n_records",
]  # fmt: skip


@triton.jit
def _valid(index, p, n_blocks, BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr):
    """The block's number, int32, -1 if there is nothing to see in it; p is its query's position."""
    index = index.to(tl.int64)
    index = tl.where((index >= 0) & (index < n_blocks), index, -1)
    if CAUSAL:
        index = tl.where(index * BLOCK_SIZE <= p, index, -1)
    return index.to(tl.int32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _selected_attention_lists_kernel(
    indices_ptr,
    lists_ptr,
    counts_ptr,
    stride_indices,
    n_rows,
    n_heads,
    n_queries,
    n_columns,
    n_blocks,
    first_position,
    BLOCK_SIZE: tl.constexpr,
    OWN: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The lists of BLOCK_M queries, and how many columns of each are not all -1.

    A row is a query of an index head; n_heads counts these; n_columns are those of the indices.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < n_rows
    i = rows % n_queries
    pair = (rows // n_queries).to(tl.int64)
    p = i + first_position  # [BLOCK_M]
    at = indices_ptr + pair // n_heads * stride_indices[0] + pair % n_heads * stride_indices[1]
    at += i.to(tl.int64) * stride_indices[2]
    columns = tl.arange(0, BLOCK_N)
    index = tl.load(
        at[:, None] + columns[None, :].to(tl.int64) * stride_indices[3],
        mask=real[:, None] & (columns < n_columns)[None, :],
        other=-1,
    )
    blocks = _valid(index, p[:, None], n_blocks, BLOCK_SIZE, CAUSAL)  # [BLOCK_M, BLOCK_N]
    unique = blocks
    for c in range(n_columns - 1):
        earlier = tl.load(at + tl.full([], c, tl.int64) * stride_indices[3], mask=real, other=-1)
        before = _valid(earlier, p, n_blocks, BLOCK_SIZE, CAUSAL)
        again = (blocks == before[:, None]) & (columns > c)[None, :]
        unique = tl.where(again, -1, unique)
    used = tl.max(tl.where(unique >= 0, columns[None, :] + 1, 0), 1)
    list_at = lists_ptr + rows.to(tl.int64) * (n_columns + OWN)
    if OWN:
        own = tl.where(p >= 0, p // BLOCK_SIZE, -1)
        named = tl.max((blocks == own[:, None]).to(tl.int32), 1)
        own = tl.where(named != 0, -1, own)
        used = tl.where(used > 0, used + 1, tl.where(own >= 0, 1, 0))
        tl.store(list_at, own, mask=real)
    tl.store(
        list_at[:, None] + OWN + columns[None, :],
        unique,
        mask=real[:, None] & (columns < n_columns)[None, :],
    )
    tl.store(counts_ptr + rows, used, mask=real)


@triton.jit
def count_tiles(count, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, GATHER: tl.constexpr):
    """Tiles of BLOCK_N keys that `count` columns of a list take."""
    if GATHER:
        return tl.cdiv(count * BLOCK_SIZE, BLOCK_N)
    else:
        return count * tl.cdiv(BLOCK_SIZE, BLOCK_N)


@triton.jit
def tile_keys(
    list_at,
    t,
    count,
    stop,
    n_keys,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr,
):
    """(column, keys) of tile t; keys: [BLOCK_N], n_keys where there is nothing to see.

    A tile lies in one block, whose column is a scalar. GATHER: it holds the keys of several
    blocks, one after the other, and each key has its column. The query sees keys before `stop`.
    """
    if GATHER:
        u = t * BLOCK_N + tl.arange(0, BLOCK_N)
        column = u // BLOCK_SIZE
        block = tl.load(list_at + column, mask=column < count, other=-1)
        within = u % BLOCK_SIZE
    else:
        TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
        column = t // TILES
        block = tl.load(list_at + column)
        within = t % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * BLOCK_SIZE + within
    seen = (block >= 0) & (within < BLOCK_SIZE) & (keys < stop)
    return column, tl.where(seen, keys, n_keys)


@triton.jit
def column_weight(weights_at, stride, column, count, OWN: tl.constexpr):
    """The weight of a column, or of each of them, float32; the own block's is 1."""
    slot = column - OWN
    at = weights_at + slot.to(tl.int64) * stride
    return tl.load(at, mask=(slot >= 0) & (column < count), other=1.0).to(tl.float32)


@triton.jit
def block_scores(
    dots,
    weight,
    score_scale,
    WEIGHTED: tl.constexpr,
    FUSED: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Products times scale and weight (a scalar, or with GATHER one for each column of dots).

    FUSED: they stay as they are, the exponent's fused multiply-add scales them.
    """
    if WEIGHTED:
        factor = score_scale * weight
        if GATHER:
            factor = factor[None, :]
        return dots * factor
    elif FUSED:
        return dots
    else:
        return dots * score_scale


# ---- the query-major kernels, forward and dQ: a program for each query and index head ----


@triton.jit
def program_query(program, n_heads, n_queries, PACK: tl.constexpr):
    """(row of the lists, query, batch, first head) of a program; all but the query are int64.

    program: its number among those that own rows.
    """
    i = program % n_queries
    pair = program // n_queries  # of batch and index head
    b = (pair // (n_heads // PACK)).to(tl.int64)
    h = (pair % (n_heads // PACK) * PACK).to(tl.int64)
    return program.to(tl.int64), i, b, h


@triton.jit
def query_list(
    lists_ptr,
    counts_ptr,
    weights_ptr,
    stride_weights,
    query,
    n_keys,
    n_columns,
    first_position,
    PACK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """(list, its used columns, end of the keys that are seen, weights or 0) of program_query."""
    row, i, b, h = query
    stop = n_keys
    if CAUSAL:
        stop = tl.minimum(i + first_position + 1, n_keys)
    weights_at = 0
    if WEIGHTED:
        weights_at = (
            weights_ptr + b * stride_weights[0] + h // PACK * stride_weights[1]
            + i.to(tl.int64) * stride_weights[2]
        )  # fmt: skip
    return lists_ptr + row * n_columns, tl.load(counts_ptr + row), stop, weights_at


@triton.jit
def load_heads(
    ptr,
    stride,
    query,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The [BLOCK_M, BLOCK_D] tile of the heads of program_query; stride is (batch, head, token)."""
    _row, i, b, h = query
    ptr += b * stride[0] + h * stride[1] + i.to(tl.int64) * stride[2]
    return load_rows(ptr, tl.arange(0, BLOCK_M), PACK, (0, 0, stride[1]), 1, D, BLOCK_D, True)


@triton.jit
def store_heads(
    ptr,
    stride,
    query,
    tile,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores what load_heads would load."""
    _row, i, b, h = query
    ptr += b * stride[0] + h * stride[1] + i.to(tl.int64) * stride[2]
    heads, of_head = tl.arange(0, BLOCK_M), (0, 0, stride[1])
    store_rows(ptr, heads, PACK, of_head, tile, 1, D, BLOCK_D, PRECISION)


@triton.jit
def scored_tile(
    q,
    k_ptr,
    t,
    visible,
    stride_k,
    stride_weight,
    score_scale,
    n_keys,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OWN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FUSED: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(column, weight, keys, k, products, scores) of tile t; visible: query_list, -inf: unseen."""
    list_at, count, stop, weights_at = visible
    column, keys = tile_keys(list_at, t, count, stop, n_keys, BLOCK_SIZE, BLOCK_N, GATHER)
    k = load_rows(k_ptr, keys, n_keys, stride_k, 1, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    dots = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    weight = 1.0
    if WEIGHTED:
        weight = column_weight(weights_at, stride_weight, column, count, OWN)
    s = block_scores(dots, weight, score_scale, WEIGHTED, FUSED, GATHER)
    s = tl.where((keys < n_keys)[None, :], s, float("-inf"))
    return column, weight, keys, k, dots, s
