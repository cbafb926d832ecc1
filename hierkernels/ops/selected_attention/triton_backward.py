"""The backward kernels: dQ for each query, then dK and dV for each block of keys.

dQ runs first and leaves the row statistics that dK/dV reads, PACK of them for each query of an
index head: level = lse in the unit of the scores (+inf for rows that see nothing: exp(-inf) is 0)
and delta = rowsum(out * dout) - dlse.

dK/dV owns the queries that selected a block, or a chunk of them (triton_inverse.py): their heads
fill tiles of rows, whatever the size of the group. A block of one chunk is written at once; the
chunks of a block that many queries selected leave partial sums, which are added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.selected_attention.triton_blocks import (
    UNSPECIALIZED,
    block_scores,
    count_tiles,
    load_heads,
    program_query,
    query_list,
    scored_tile,
    store_heads,
)
from hierkernels.triton_common.tiles import (
    LOG2E,
    dot,
    load_rows,
    powers,
    rounded,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _selected_attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    weights_ptr,
    lists_ptr,
    counts_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    level_ptr,
    delta_ptr,
    dq_ptr,
    dweights_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_weights,
    stride_out,
    stride_dout,
    stride_dq,
    scale,
    score_scale,
    n_heads,
    n_queries,
    n_keys,
    n_columns,
    first_position,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    OWN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GATHER: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
    DLSE: tl.constexpr,
    DWEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one query and PACK heads, their row statistics; dweights if asked for (no GATHER).

    dweights is contiguous, float32, and holds zeros.
    """
    query = program_query(tl.program_id(0), n_heads, n_queries, PACK)
    row, i, b, h = query
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    v_ptr += b * stride_v[0] + h // GROUP * stride_v[1]
    visible = query_list(
        lists_ptr, counts_ptr, weights_ptr, stride_weights, query, n_keys, n_columns,
        first_position, PACK, CAUSAL, WEIGHTED,
    )  # fmt: skip

    heads = tl.arange(0, BLOCK_M)
    q = load_heads(q_ptr, stride_q, query, PACK, BLOCK_M, D, BLOCK_D)
    o = load_heads(out_ptr, stride_out, query, PACK, BLOCK_M, DV, BLOCK_DV)
    do = load_heads(dout_ptr, stride_dout, query, PACK, BLOCK_M, DV, BLOCK_DV)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M]
    lse_at = (b * n_heads + h + heads) * n_queries + i
    lse = tl.load(lse_ptr + lse_at, mask=heads < PACK, other=float("-inf"))
    empty = lse == float("-inf")
    if DLSE:
        dlse = tl.load(dlse_ptr + lse_at, mask=heads < PACK, other=0.0)
        delta -= tl.where(empty, 0.0, dlse)
    level = tl.where(empty, float("inf"), lse if NATURAL else lse * LOG2E)
    tl.store(delta_ptr + row * PACK + heads, delta, mask=heads < PACK)
    tl.store(level_ptr + row * PACK + heads, level, mask=heads < PACK)

    factor = score_scale if FUSED else 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dweight = 0.0
    for t in range(count_tiles(visible[1], BLOCK_SIZE, BLOCK_N, GATHER)):
        column, weight, keys, k, dots, s = scored_tile(
            q, k_ptr, t, visible, stride_k, stride_weights[3], score_scale, n_keys, D, BLOCK_D,
            BLOCK_N, BLOCK_SIZE, OWN, WEIGHTED, FUSED, GATHER, PRECISION,
        )  # fmt: skip
        v = load_rows(v_ptr, keys, n_keys, stride_v, 1, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
        dp = dot(do, tl.trans(v), None, PRECISION)
        p = powers(s, level[:, None], factor, NATURAL, PRECISION)
        ds = p * (dp - delta[:, None])
        if DWEIGHTS:
            # The tiles of a block follow one another: the last one stores the whole sum.
            TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
            dweight = tl.where(t % TILES == 0, 0.0, dweight) + tl.sum(ds * dots)
            slots = n_columns - OWN
            is_last = (t % TILES == TILES - 1) & (column >= OWN)
            tl.store(dweights_ptr + row * slots + column - OWN, dweight * scale, mask=is_last)
        if WEIGHTED:
            ds = block_scores(ds, weight, 1.0, True, False, GATHER)
        acc = dot(rounded(ds, k.dtype, PRECISION), k, acc, PRECISION)
    acc *= scale
    store_heads(dq_ptr, stride_dq, query, acc, PACK, BLOCK_M, D, BLOCK_D, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _selected_attention_backward_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    level_ptr,
    delta_ptr,
    rows_ptr,
    row_weights_ptr,
    starts_ptr,
    first_item_ptr,
    first_part_ptr,
    item_block_ptr,
    dk_ptr,
    dv_ptr,
    parts_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_dk,
    stride_dv,
    scale,
    score_scale,
    chunk,
    n_items,
    n_heads,
    n_queries,
    n_keys,
    n_blocks,
    first_position,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of a block from a chunk of its queries; scores are transposed.

    SPLIT: there may be blocks of several chunks.
    """
    TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % TILES
    item = tl.program_id(0) // TILES  # of those of all pairs
    block = tl.load(item_block_ptr + item)
    if block >= n_blocks:  # there are fewer items than there could be
        return
    pair = item // n_items  # of batch and key/value head
    kv_heads = n_heads // GROUP
    batch, kv_head = pair // kv_heads, pair % kv_heads
    b = batch.to(tl.int64)
    hk = kv_head.to(tl.int64)
    of_all = pair * n_blocks + block
    first_item = tl.load(first_item_ptr + of_all)
    begin = tl.load(starts_ptr + of_all)
    end = tl.load(starts_ptr + of_all + 1)
    whole = end - begin <= chunk
    begin += (item % n_items - first_item) * chunk
    end = tl.minimum(begin + chunk, end)

    within = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * BLOCK_SIZE + within
    keys = tl.where(within < BLOCK_SIZE, keys, n_keys)
    k_ptr += b * stride_k[0] + hk * stride_k[1]
    v_ptr += b * stride_v[0] + hk * stride_v[1]
    k = load_rows(k_ptr, keys, n_keys, stride_k, 1, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, keys, n_keys, stride_v, 1, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    q_ptr += b * stride_q[0] + tl.arange(0, BLOCK_D)[None, :]
    dout_ptr += b * stride_dout[0] + tl.arange(0, BLOCK_DV)[None, :]
    factor = score_scale if FUSED else 1.0
    first_row = batch * (n_heads // PACK) * n_queries
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for r0 in range(0, (end - begin) * PACK, BLOCK_M):
        r = r0 + tl.arange(0, BLOCK_M)
        real = r < (end - begin) * PACK
        at = (begin + r // PACK).to(tl.int64)
        row = tl.load(rows_ptr + at, mask=real, other=0)  # of a query and an index head
        i = (row - first_row) % n_queries
        head = (row - first_row) // n_queries * PACK + r % PACK
        token, head = i.to(tl.int64)[:, None], head.to(tl.int64)[:, None]
        q_at = q_ptr + head * stride_q[1] + token * stride_q[2]
        do_at = dout_ptr + head * stride_dout[1] + token * stride_dout[2]
        has_d = real[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        has_dv = real[:, None] & (tl.arange(0, BLOCK_DV) < DV)[None, :]
        q = tl.load(q_at, mask=has_d, other=0.0)  # [BLOCK_M, BLOCK_D]
        do = tl.load(do_at, mask=has_dv, other=0.0)  # [BLOCK_M, BLOCK_DV]
        stats = row.to(tl.int64) * PACK + r % PACK
        level = tl.load(level_ptr + stats, mask=real, other=float("inf"))
        delta = tl.load(delta_ptr + stats, mask=real, other=0.0)
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(row_weights_ptr + at, mask=real, other=0.0)
        dots = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
        s = block_scores(dots, weight, score_scale, WEIGHTED, FUSED, True)
        if CAUSAL:
            s = tl.where(keys[:, None] <= (i + first_position)[None, :], s, float("-inf"))
        p = powers(s, level[None, :], factor, NATURAL, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        dv = dot(rounded(p, do.dtype, PRECISION), do, dv, PRECISION)
        ds = p * (dp - delta[None, :])
        if WEIGHTED:
            ds = block_scores(ds, weight, 1.0, True, False, True)
        dk = dot(rounded(ds, q.dtype, PRECISION), q, dk, PRECISION)
    dk *= scale
    if whole or not SPLIT:
        dk_ptr += b * stride_dk[0] + hk * stride_dk[1]
        dv_ptr += b * stride_dv[0] + hk * stride_dv[1]
        store_rows(dk_ptr, keys, n_keys, stride_dk, dk, 1, D, BLOCK_D, PRECISION)
        store_rows(dv_ptr, keys, n_keys, stride_dv, dv, 1, DV, BLOCK_DV, PRECISION)
    else:
        part = tl.load(first_part_ptr + of_all) + item % n_items - first_item
        part_at = parts_ptr + part.to(tl.int64) * BLOCK_SIZE * (D + DV)
        stride_part = (0, 0, D + DV)
        store_rows(part_at, within, BLOCK_SIZE, stride_part, dk, 1, D, BLOCK_D, PRECISION)
        store_rows(part_at + D, within, BLOCK_SIZE, stride_part, dv, 1, DV, BLOCK_DV, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _selected_attention_backward_sum_kernel(
    parts_ptr,
    starts_ptr,
    first_part_ptr,
    dk_ptr,
    dv_ptr,
    stride_dk,
    stride_dv,
    chunk,
    n_heads,
    n_keys,
    n_blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of a block of several chunks, summed in their order."""
    TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % TILES
    of_all = tl.program_id(0) // TILES  # block of all pairs
    count = tl.load(starts_ptr + of_all + 1) - tl.load(starts_ptr + of_all)
    if count <= chunk:
        return
    pair = of_all // n_blocks
    kv_heads = n_heads // GROUP
    b, hk = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    within = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = tl.where(within < BLOCK_SIZE, of_all % n_blocks * BLOCK_SIZE + within, n_keys)
    stride_part = (0, 0, D + DV)
    part_at = parts_ptr + tl.load(first_part_ptr + of_all).to(tl.int64) * BLOCK_SIZE * (D + DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for _ in range(tl.cdiv(count, chunk)):
        dk += load_rows(part_at, within, BLOCK_SIZE, stride_part, 1, D, BLOCK_D, True)
        dv += load_rows(part_at + D, within, BLOCK_SIZE, stride_part, 1, DV, BLOCK_DV, True)
        part_at += BLOCK_SIZE * (D + DV)
    dk_ptr += b * stride_dk[0] + hk * stride_dk[1]
    dv_ptr += b * stride_dv[0] + hk * stride_dv[1]
    store_rows(dk_ptr, keys, n_keys, stride_dk, dk, 1, D, BLOCK_D, PRECISION)
    store_rows(dv_ptr, keys, n_keys, stride_dv, dv, 1, DV, BLOCK_DV, PRECISION)
