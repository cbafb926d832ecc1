"""The two backward kernels: dQ for each tile of query rows, then dK and dV for each tile of keys.

Where a tile holds several sequences (triton_places.py), dQ's kernel is the only one: its rows are
all that see the tile's keys, and dK and dV are sums over them.

dQ runs first and leaves the row statistics in the order and form that the others read:
level = lse in the unit of the scores (+inf for rows that see nothing: exp(-inf) is 0) and
delta = rowsum(out * dout) - dlse, both in packed-row order, n_stats numbers a slot
(n_stats is a multiple of every BLOCK_M), so that they are loaded without a mask; with several
sequences in a tile, in the order of lse.

The bias gradient is deterministic and never takes a (B, H, Nq, Nk) temporary:
  - a bias of full shape: each element has one writer, a tile of the dQ kernel (DBIAS "store");
  - one row for all queries: the dK/dV kernel sums over the queries of its keys (DBIAS "head" or
    "group": one row for each query head or for each key/value head);
  - shared between batches or heads only, and any other of short sequences:
    triton_bias_gradient.py;
  - one number for all keys: the softmax does not see it, its gradient is that of lse alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.attention.triton_places import (
    UNSPECIALIZED,
    column_spans,
    key_places,
    offsets,
    program_slot,
    row_bound,
    row_places,
    same_item,
)
from hierkernels.ops.attention.triton_scores import (
    modified,
    score_factor,
    scores_at,
    whole_vectors,
)
from hierkernels.triton_common.key_range import (
    first_reaching,
    phase_span,
    phase_tile,
    query_spans,
    within,
)
from hierkernels.triton_common.philox import dropout_keep
from hierkernels.triton_common.tiles import (
    LOG2E,
    dot,
    load_rows,
    load_tile,
    powers,
    rounded,
    store_rows,
    store_tile,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_backward_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    padding_ptr,
    seed_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    level_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dbias_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_mask,
    stride_padding,
    stride_out,
    stride_dout,
    stride_dq,
    stride_dk,
    stride_dv,
    stride_dbias,
    scale,
    score_scale,
    softcap,
    dropout_threshold,
    dropout_scale,
    n_heads,
    n_queries,
    n_keys,
    n_stats,
    n_items,
    items_of_slot,
    lo_shift,
    lo_rise,
    lo_offset,
    lo_floor,
    hi_shift,
    hi_rise,
    hi_offset,
    hi_floor,
    LO_STEP: tl.constexpr,
    HI_STEP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    SEVERAL: tl.constexpr,
    STATS: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
    DBIAS: tl.constexpr,
    DLSE: tl.constexpr,
    LOOP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one tile of rows, its row statistics, and its rows of dbias if DBIAS is "store".

    With SEVERAL these are all rows that see the keys of the slot: dk and dv are written as well,
    and no other kernel needs the statistics but that of a shared bias.
    """
    if EVEN:
        n_keys = whole_vectors(n_keys)
    lo_stairs = (lo_shift, LO_STEP, lo_rise, lo_offset, lo_floor)
    hi_stairs = (hi_shift, HI_STEP, hi_rise, hi_offset, hi_floor)
    m0, batch, head, number, slot = program_slot(
        tl.program_id(0), n_stats, n_heads, n_queries, n_keys, n_items, items_of_slot, BLOCK_M,
        PACK, SEVERAL,
    )  # fmt: skip
    b = batch.to(tl.int64)
    h = head.to(tl.int64)
    q_ptr += b * stride_q[0] + h * stride_q[1]
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    v_ptr += b * stride_v[0] + h // GROUP * stride_v[1]
    out_ptr += b * stride_out[0] + h * stride_out[1]
    dout_ptr += b * stride_dout[0] + h * stride_dout[1]
    dq_ptr += b * stride_dq[0] + h * stride_dq[1]
    dbias_at = b * stride_dbias[0] + h * stride_dbias[1]
    mods = scores_at(
        (score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr,
         stride_padding),
        b, h, BIAS, MASK, PADDING,
    )  # fmt: skip
    factor = score_factor(mods, FUSED)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    rows = m0 + tl.arange(0, BLOCK_M)
    is_row = rows < slot[1]
    row = row_places(rows, slot, PACK, SEVERAL)
    do_at = offsets(row, stride_dout, PACK, SEVERAL)
    do = load_tile(dout_ptr, do_at, is_row, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    o_at = offsets(row, stride_out, PACK, SEVERAL)
    o = load_tile(out_ptr, o_at, is_row, DV, BLOCK_DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M]
    stride_lse = (n_heads * n_queries, n_queries, 1)
    row_at = (b * n_heads + h) * n_queries + offsets(row, stride_lse, PACK, SEVERAL)
    lse = tl.load(lse_ptr + row_at, mask=is_row, other=float("-inf"))
    empty = lse == float("-inf")
    if DLSE:
        dlse = tl.load(dlse_ptr + row_at, mask=is_row, other=0.0)
        delta -= tl.where(empty, 0.0, dlse)
    level = tl.where(empty, float("inf"), lse if NATURAL else lse * LOG2E)
    if STATS == "packed":
        tl.store(delta_ptr + number.to(tl.int64) * n_stats + rows, delta)
        tl.store(level_ptr + number.to(tl.int64) * n_stats + rows, level)
    elif STATS == "natural":
        tl.store(delta_ptr + row_at, delta, mask=is_row)
        tl.store(level_ptr + row_at, level, mask=is_row)

    lo = row_bound(rows, lo_stairs, slot, PACK, SEVERAL)
    hi = row_bound(rows, hi_stairs, slot, PACK, SEVERAL)
    begin, mid_begin, mid_end, end = column_spans(
        m0, slot, lo_stairs, hi_stairs, BLOCK_M, BLOCK_N, PACK, SEVERAL
    )
    q_at = offsets(row, stride_q, PACK, SEVERAL)
    q = load_tile(q_ptr, q_at, is_row, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for phase in tl.static_range(2 if LOOP == "split" else 1):
        start, stop = phase_span(begin, mid_begin, mid_end, end, phase, LOOP)
        for at in range(start, stop, BLOCK_N):
            n0 = phase_tile(at, mid_begin, mid_end, phase, LOOP)
            columns = n0 + tl.arange(0, BLOCK_N)
            is_key = columns < slot[2]
            key = key_places(columns, slot, PACK, SEVERAL)
            k_at = offsets(key, stride_k, 1, SEVERAL)
            k = load_tile(
                k_ptr, k_at, is_key, D, BLOCK_D, LOOP != "split" or phase == 1
            )  # [BLOCK_N, BLOCK_D]
            v_at = offsets(key, stride_v, 1, SEVERAL)
            v = load_tile(
                v_ptr, v_at, is_key, DV, BLOCK_DV, LOOP != "split" or phase == 1
            )  # [BLOCK_N, BLOCK_DV]
            dots = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
            dp = dot(do, tl.trans(v), None, PRECISION)
            s, slope = modified(
                dots, mods, rows[:, None], columns[None, :], slot,
                PACK, SEVERAL, BIAS, MASK, PADDING, SOFTCAP, FUSED, NATURAL,
            )  # fmt: skip
            s = within(
                s, columns[None, :], lo[:, None], hi[:, None], n0, mid_begin, mid_end, phase, LOOP
            )
            p = powers(s, level[:, None], factor, NATURAL, PRECISION)
            weights = p
            if DROPOUT:
                keep = dropout_keep(
                    seed, row[2], head + row[1], batch + row[0], n0, key[2], dropout_threshold,
                    BLOCK_M, BLOCK_N, False, not SEVERAL,
                )  # fmt: skip
                weights = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            if SEVERAL:
                dv = dot(tl.trans(rounded(weights, do.dtype, PRECISION)), do, None, PRECISION)
                dv_at = offsets(key, stride_dv, 1, SEVERAL)
                store_tile(dv_ptr, dv_at, is_key, dv * dropout_scale, DV, BLOCK_DV, PRECISION)
            ds = p * (dp - delta[:, None])
            if DBIAS == "store":
                at_b = offsets(row, stride_dbias, PACK, SEVERAL)[:, None] + key[2][None, :]
                tl.store(
                    dbias_ptr + dbias_at + at_b,
                    rounded(ds, dbias_ptr.dtype.element_ty, PRECISION),
                    mask=same_item(rows[:, None], columns[None, :], slot, PACK, SEVERAL),
                )
            ds = rounded(ds * slope, k.dtype, PRECISION)
            acc = dot(ds, k, acc, PRECISION)
            if SEVERAL:
                dk = dot(tl.trans(ds), q, None, PRECISION)
                dk_at = offsets(key, stride_dk, 1, SEVERAL)
                store_tile(dk_ptr, dk_at, is_key, dk * scale, D, BLOCK_D, PRECISION)
    dq_at = offsets(row, stride_dq, PACK, SEVERAL)
    store_tile(dq_ptr, dq_at, is_row, acc * scale, D, BLOCK_D, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_backward_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    padding_ptr,
    seed_ptr,
    dout_ptr,
    level_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dbias_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_mask,
    stride_padding,
    stride_dout,
    stride_dk,
    stride_dv,
    scale,
    score_scale,
    softcap,
    dropout_threshold,
    dropout_scale,
    n_heads,
    n_queries,
    n_keys,
    n_stats,
    lo_shift,
    lo_rise,
    lo_offset,
    lo_floor,
    hi_shift,
    hi_rise,
    hi_offset,
    hi_floor,
    LO_STEP: tl.constexpr,
    HI_STEP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
    DBIAS: tl.constexpr,
    LOOP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one tile of keys, summed over the heads of its group; scores are transposed.

    dbias (DBIAS "head": (B, Hq, Nk), "group": (B, Hkv, Nk), float32) sums ds over the queries.
    """
    if EVEN:
        n_keys = whole_vectors(n_keys)
    lo_stairs = (lo_shift, LO_STEP, lo_rise, lo_offset, lo_floor)
    hi_stairs = (hi_shift, HI_STEP, hi_rise, hi_offset, hi_floor)
    n_rows = n_queries * PACK
    tiles = tl.cdiv(n_keys, BLOCK_N)
    n0 = tl.program_id(0) % tiles * BLOCK_N
    pair = tl.program_id(0) // tiles  # of batch and key/value head
    batch = pair // (n_heads // GROUP)
    kv_head = pair % (n_heads // GROUP)
    b = batch.to(tl.int64)
    hk = kv_head.to(tl.int64)
    keys = n0 + tl.arange(0, BLOCK_N)
    slot = (0, n_rows, n_keys, n_heads, n_queries, n_keys)
    k_ptr += b * stride_k[0] + hk * stride_k[1]
    v_ptr += b * stride_v[0] + hk * stride_v[1]
    k = load_rows(k_ptr, keys, n_keys, stride_k, 1, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, keys, n_keys, stride_v, 1, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    if DROPOUT:
        seed = tl.load(seed_ptr)

    # The queries that see a key are a range as well.
    last_key = tl.minimum(n0 + BLOCK_N, n_keys) - 1
    begin, mid_begin, mid_end, end = query_spans(
        n0, last_key, lo_stairs, hi_stairs, n_queries, PACK, BLOCK_M
    )
    row_lo = first_reaching(keys + 1, hi_stairs, n_queries) * PACK
    row_hi = first_reaching(keys + 1, lo_stairs, n_queries) * PACK
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    for g in range(0, GROUP, PACK):  # once when the heads are packed
        head = kv_head * GROUP + g
        h = head.to(tl.int64)
        q_at = q_ptr + b * stride_q[0] + h * stride_q[1]
        do_at = dout_ptr + b * stride_dout[0] + h * stride_dout[1]
        # Whole tiles of rows, so that the statistics are loaded four at a time.
        stats = tl.multiple_of((b * n_heads + h) // PACK * n_stats, 16)
        mods = scores_at(
            (score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr,
             stride_padding),
            b, h, BIAS, MASK, PADDING,
        )  # fmt: skip
        factor = score_factor(mods, FUSED)
        for phase in tl.static_range(2 if LOOP == "split" else 1):
            start, stop = phase_span(begin, mid_begin, mid_end, end, phase, LOOP)
            for at in range(start, stop, BLOCK_M):
                m0 = phase_tile(at, mid_begin, mid_end, phase, LOOP)
                m0 = tl.multiple_of(m0, BLOCK_M)
                rows = m0 + tl.arange(0, BLOCK_M)
                q = load_rows(
                    q_at, rows, n_rows, stride_q, PACK, D, BLOCK_D, LOOP != "split" or phase == 1
                )  # [BLOCK_M, BLOCK_D]
                do = load_rows(
                    do_at, rows, n_rows, stride_dout, PACK, DV, BLOCK_DV,
                    LOOP != "split" or phase == 1,
                )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
                level = tl.load(level_ptr + stats + rows)
                delta = tl.load(delta_ptr + stats + rows)
                dots = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
                s, slope = modified(
                    dots, mods, rows[None, :], keys[:, None], slot,
                    PACK, False, BIAS, MASK, PADDING, SOFTCAP, FUSED, NATURAL,
                )  # fmt: skip
                s = within(
                    s, rows[None, :], row_lo[:, None], row_hi[:, None], m0, mid_begin, mid_end,
                    phase, LOOP,
                )  # fmt: skip
                p = powers(s, level[None, :], factor, NATURAL, PRECISION)
                dp = dot(v, tl.trans(do), None, PRECISION)
                weights = p
                if DROPOUT:
                    keep = dropout_keep(
                        seed, rows // PACK, head + rows % PACK, batch, n0, keys,
                        dropout_threshold, BLOCK_M, BLOCK_N, True,
                    )  # fmt: skip
                    weights = tl.where(keep, p, 0.0)
                    dp = tl.where(keep, dp * dropout_scale, 0.0)
                dv = dot(rounded(weights, do.dtype, PRECISION), do, dv, PRECISION)
                ds = p * (dp - delta[None, :])
                if DBIAS != "none":
                    dbias += tl.sum(ds, 1)
                dk = dot(rounded(ds * slope, q.dtype, PRECISION), q, dk, PRECISION)
        if DBIAS == "head":
            tl.store(dbias_ptr + (b * n_heads + h) * n_keys + keys, dbias, mask=keys < n_keys)
            dbias = tl.zeros([BLOCK_N], tl.float32)
    if DBIAS == "group":
        tl.store(dbias_ptr + pair.to(tl.int64) * n_keys + keys, dbias, mask=keys < n_keys)
    dk_ptr += b * stride_dk[0] + hk * stride_dk[1]
    dv_ptr += b * stride_dv[0] + hk * stride_dv[1]
    store_rows(dk_ptr, keys, n_keys, stride_dk, dk * scale, 1, D, BLOCK_D, PRECISION)
    store_rows(dv_ptr, keys, n_keys, stride_dv, dv * dropout_scale, 1, DV, BLOCK_DV, PRECISION)
