"""The forward kernel: one program for each query and index head, the heads that share it as rows.

With an index head for every query head a tile has one row. The tensor instructions then compute 15
rows of nothing, about 16 operations for each byte of keys, so the keys' way is still what takes
the time; packing neighbouring queries would not shorten it, as each has blocks of its own.

Where there are few programs, several share a query's list (triton_common/parts.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.selected_attention.triton_blocks import (
    UNSPECIALIZED,
    count_tiles,
    load_heads,
    program_query,
    query_list,
    scored_tile,
    store_heads,
)
from hierkernels.triton_common.parts import share, store_records
from hierkernels.triton_common.tiles import (
    LOWEST,
    dot,
    load_rows,
    natural_lse,
    powers,
    program_part,
    rounded,
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
    parts_ptr,
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
    n_parts,
    n_records,
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
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse (natural logarithm) of one query and PACK heads; n_columns are a list's.

    PARTS: the records of one of n_parts parts of the list instead.
    """
    program, part = program_part(n_parts, PARTS)
    query = program_query(program, n_heads, n_queries, PACK)
    _row, i, b, h = query
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    v_ptr += b * stride_v[0] + h // GROUP * stride_v[1]
    visible = query_list(
        lists_ptr, counts_ptr, weights_ptr, stride_weights, query, n_keys, n_columns,
        first_position, PACK, CAUSAL, WEIGHTED,
    )  # fmt: skip

    heads = tl.arange(0, BLOCK_M)
    q = load_heads(q_ptr, stride_q, query, PACK, BLOCK_M, D, BLOCK_D)
    factor = score_scale if FUSED else 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin, end = 0, count_tiles(visible[1], BLOCK_SIZE, BLOCK_N, GATHER)
    if PARTS:
        begin, end = share(begin, end, part, n_parts, 1)
    for t in range(begin, end):
        _column, _weight, keys, _k, _dots, s = scored_tile(
            q, k_ptr, t, visible, stride_k, stride_weights[3], score_scale, n_keys, D, BLOCK_D,
            BLOCK_N, BLOCK_SIZE, OWN, WEIGHTED, FUSED, GATHER, PRECISION,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(s, 1) * factor)
        p = powers(s, new_top[:, None], factor, NATURAL, PRECISION)
        shrink = powers(top, new_top, 1.0, NATURAL, PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        v = load_rows(v_ptr, keys, n_keys, stride_v, 1, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
        acc = dot(rounded(p, v.dtype, PRECISION), v, acc * shrink[:, None], PRECISION)

    lse_at = (b * n_heads + h) * n_queries + i + heads.to(tl.int64) * n_queries
    if PARTS:
        store_records(
            parts_ptr, lse_at, heads < PACK, part, n_parts, n_records, acc, top, total, DV, BLOCK_DV
        )
    else:
        safe = tl.where(total == 0.0, 1.0, total)
        out = acc / safe[:, None]
        store_heads(out_ptr, stride_out, query, out, PACK, BLOCK_M, DV, BLOCK_DV, PRECISION)
        lse = natural_lse(top, total, NATURAL, PRECISION)
        tl.store(lse_ptr + lse_at, lse, mask=heads < PACK)
