"""The forward kernel: one program for each query and index head, the heads that share it as rows.

With an index head for every query head a tile has one row. The tensor instructions then compute 15
rows of nothing, about 16 operations for each byte of keys, so the keys' way is still what takes
the time; packing neighbouring queries would not shorten it, as each has blocks of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.selected_attention.triton_blocks import (
    UNSPECIALIZED,
    block_scores,
    column_weight,
    count_tiles,
    tile_keys,
)
from hierkernels.triton_common.tiles import (
    LOWEST,
    dot,
    load_rows,
    natural_lse,
    powers,
    rounded,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _selected_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    weights_ptr,
    lists_ptr,
    counts_ptr,
    out_ptr,
    lse_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_weights,
    stride_out,
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
    PRECISION: tl.constexpr,
):
    """out and lse (natural logarithm) of one query and PACK heads; n_columns are a list's."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(0) % n_queries
    pair = tl.program_id(0) // n_queries  # of batch and index head
    b = (pair // (n_heads // PACK)).to(tl.int64)
    h = (pair % (n_heads // PACK) * PACK).to(tl.int64)
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    v_ptr += b * stride_v[0] + h // GROUP * stride_v[1]
    list_at = lists_ptr + row * n_columns
    count = tl.load(counts_ptr + row)
    stop = n_keys
    if CAUSAL:
        stop = tl.minimum(i + first_position + 1, n_keys)
    if WEIGHTED:
        weights_at = (
            weights_ptr + b * stride_weights[0] + h // PACK * stride_weights[1]
            + i.to(tl.int64) * stride_weights[2]
        )  # fmt: skip

    heads = tl.arange(0, BLOCK_M)
    q_ptr += b * stride_q[0] + h * stride_q[1] + i.to(tl.int64) * stride_q[2]
    q = load_rows(q_ptr, heads, PACK, (0, 0, stride_q[1]), 1, D, BLOCK_D, True)
    factor = score_scale if FUSED else 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for t in range(count_tiles(count, BLOCK_SIZE, BLOCK_N, GATHER)):
        column, keys = tile_keys(list_at, t, count, stop, n_keys, BLOCK_SIZE, BLOCK_N, GATHER)
        k = load_rows(k_ptr, keys, n_keys, stride_k, 1, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        dots = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
        weight = 1.0
        if WEIGHTED:
            weight = column_weight(weights_at, stride_weights[3], column, count, OWN)
        s = block_scores(dots, weight, score_scale, WEIGHTED, FUSED, GATHER)
        s = tl.where((keys < n_keys)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * factor)
        p = powers(s, new_top[:, None], factor, NATURAL, PRECISION)
        shrink = powers(top, new_top, 1.0, NATURAL, PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        v = load_rows(v_ptr, keys, n_keys, stride_v, 1, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
        acc = dot(rounded(p, v.dtype, PRECISION), v, acc * shrink[:, None], PRECISION)

    safe = tl.where(total == 0.0, 1.0, total)
    out_ptr += b * stride_out[0] + h * stride_out[1] + i.to(tl.int64) * stride_out[2]
    out_stride = (0, 0, stride_out[1])
    store_rows(out_ptr, heads, PACK, out_stride, acc / safe[:, None], 1, DV, BLOCK_DV, PRECISION)
    lse = natural_lse(top, total, NATURAL, PRECISION)
    lse_ptr += (b * n_heads + h) * n_queries + i
    tl.store(lse_ptr + heads.to(tl.int64) * n_queries, lse, mask=heads < PACK)
