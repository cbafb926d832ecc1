"""The forward kernel: attention over any key range, one program for each tile of query rows.

Where there are few of them, several programs share the keys of a tile (triton_common/parts.py).
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
)
from hierkernels.ops.attention.triton_scores import (
    modified,
    score_factor,
    scores_at,
    whole_vectors,
)
from hierkernels.triton_common.key_range import phase_span, phase_tile, within
from hierkernels.triton_common.parts import share_of_spans, store_records
from hierkernels.triton_common.philox import dropout_keep
from hierkernels.triton_common.tiles import (
    LOWEST,
    dot,
    load_tile,
    natural_lse,
    powers,
    program_part,
    rounded,
    store_tile,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    mask_ptr,
    padding_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    parts_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_mask,
    stride_padding,
    stride_out,
    score_scale,
    softcap,
    dropout_threshold,
    dropout_scale,
    n_heads,
    n_queries,
    n_keys,
    n_items,
    items_of_slot,
    n_parts,
    n_records,
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
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
    LOOP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse (natural logarithm) of one tile of rows; DESCRIPTORS: not with SEVERAL.

    PARTS: the records of one of n_parts parts of the keys instead.
    """
    if EVEN:
        n_keys = whole_vectors(n_keys)
    lo_stairs = (lo_shift, LO_STEP, lo_rise, lo_offset, lo_floor)
    hi_stairs = (hi_shift, HI_STEP, hi_rise, hi_offset, hi_floor)
    program, part = program_part(n_parts, PARTS)
    m0, batch, head, _number, slot = program_slot(
        program, n_queries * PACK, n_heads, n_queries, n_keys, n_items, items_of_slot, BLOCK_M,
        PACK, SEVERAL,
    )  # fmt: skip
    b = batch.to(tl.int64)
    h = head.to(tl.int64)
    q_ptr += b * stride_q[0] + h * stride_q[1]
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    v_ptr += b * stride_v[0] + h // GROUP * stride_v[1]
    out_ptr += b * stride_out[0] + h * stride_out[1]
    lse_ptr += (b * n_heads + h) * n_queries
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
    lo = row_bound(rows, lo_stairs, slot, PACK, SEVERAL)
    hi = row_bound(rows, hi_stairs, slot, PACK, SEVERAL)
    spans = column_spans(m0, slot, lo_stairs, hi_stairs, BLOCK_M, BLOCK_N, PACK, SEVERAL)
    if PARTS:
        spans = share_of_spans(spans, part, n_parts, BLOCK_N)
    begin, mid_begin, mid_end, end = spans
    q_at = offsets(row, stride_q, PACK, SEVERAL)
    q = load_tile(q_ptr, q_at, is_row, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    if DESCRIPTORS:
        k_tiles = tl.make_tensor_descriptor(
            k_ptr, [n_keys, D], [stride_k[2], 1], [BLOCK_N, BLOCK_D]
        )
        v_tiles = tl.make_tensor_descriptor(
            v_ptr, [n_keys, DV], [stride_v[2], 1], [BLOCK_N, BLOCK_DV]
        )
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(2 if LOOP == "split" else 1):
        start, stop = phase_span(begin, mid_begin, mid_end, end, phase, LOOP)
        for at in range(start, stop, BLOCK_N):
            n0 = phase_tile(at, mid_begin, mid_end, phase, LOOP)
            columns = n0 + tl.arange(0, BLOCK_N)
            is_key = columns < slot[2]
            key = key_places(columns, slot, PACK, SEVERAL)
            if DESCRIPTORS:
                k = k_tiles.load([n0, 0])  # [BLOCK_N, BLOCK_D]
            else:
                k_at = offsets(key, stride_k, 1, SEVERAL)
                k = load_tile(k_ptr, k_at, is_key, D, BLOCK_D, LOOP != "split" or phase == 1)
            dots = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
            s, _slope = modified(
                dots, mods, rows[:, None], columns[None, :], slot,
                PACK, SEVERAL, BIAS, MASK, PADDING, SOFTCAP, FUSED, NATURAL,
            )  # fmt: skip
            s = within(
                s, columns[None, :], lo[:, None], hi[:, None], n0, mid_begin, mid_end, phase, LOOP
            )
            new_top = tl.maximum(top, tl.max(s, 1) * factor)
            p = powers(s, new_top[:, None], factor, NATURAL, PRECISION)
            shrink = powers(top, new_top, 1.0, NATURAL, PRECISION)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            top = new_top
            if DROPOUT:
                keep = dropout_keep(
                    seed, row[2], head + row[1], batch + row[0], n0, key[2], dropout_threshold,
                    BLOCK_M, BLOCK_N, False, not SEVERAL,
                )  # fmt: skip
                p = tl.where(keep, p, 0.0)
            if DESCRIPTORS:
                v = v_tiles.load([n0, 0])  # [BLOCK_N, BLOCK_DV]
            else:
                v_at = offsets(key, stride_v, 1, SEVERAL)
                v = load_tile(v_ptr, v_at, is_key, DV, BLOCK_DV, LOOP != "split" or phase == 1)
            acc = dot(rounded(p, v.dtype, PRECISION), v, acc, PRECISION)

    stride_lse = n_heads * n_queries
    lse_at = offsets(row, (stride_lse, n_queries, 1), PACK, SEVERAL)
    if PARTS:
        lse_at += (b * n_heads + h) * n_queries
        store_records(
            parts_ptr, lse_at, is_row, part, n_parts, n_records, acc, top, total, DV, BLOCK_DV
        )
    else:
        safe = tl.where(total == 0.0, 1.0, total)
        out = acc * (dropout_scale / safe)[:, None]
        out_at = offsets(row, stride_out, PACK, SEVERAL)
        store_tile(out_ptr, out_at, is_row, out, DV, BLOCK_DV, PRECISION)
        lse = natural_lse(top, total, NATURAL, PRECISION)
        tl.store(lse_ptr + lse_at, lse, mask=is_row)
