"""The forward kernel: attention over any key range, one program for each tile of query rows."""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.attention.triton_scores import (
    UNSPECIALIZED,
    modified,
    program_rows,
    score_factor,
    scores_at,
)
from hierkernels.triton_common.key_range import bound, key_spans, phase_span, phase_tile, within
from hierkernels.triton_common.philox import dropout_keep
from hierkernels.triton_common.tiles import (
    LOWEST,
    dot,
    load_rows,
    natural_lse,
    powers,
    rounded,
    row_offsets,
    store_rows,
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
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse (natural logarithm) of one tile of rows."""
    lo_stairs = (lo_shift, LO_STEP, lo_rise, lo_offset, lo_floor)
    hi_stairs = (hi_shift, HI_STEP, hi_rise, hi_offset, hi_floor)
    n_rows = n_queries * PACK
    m0, batch, head, _slot = program_rows(n_rows, n_heads, BLOCK_M, PACK)
    b = batch.to(tl.int64)
    h = head.to(tl.int64)
    q_ptr += b * stride_q[0] + h * stride_q[1]
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    v_ptr += b * stride_v[0] + h // GROUP * stride_v[1]
    out_ptr += b * stride_out[0] + h * stride_out[1]
    mods = scores_at(
        (score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr,
         stride_padding),
        b, h, BIAS, MASK, PADDING,
    )  # fmt: skip
    factor = score_factor(mods, FUSED)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    rows = m0 + tl.arange(0, BLOCK_M)
    lo = bound(rows // PACK, lo_stairs, n_keys)
    hi = bound(rows // PACK, hi_stairs, n_keys)
    first, last = m0 // PACK, (tl.minimum(m0 + BLOCK_M, n_rows) - 1) // PACK
    begin, mid_begin, mid_end, end = key_spans(first, last, lo_stairs, hi_stairs, n_keys, BLOCK_N)
    q = load_rows(q_ptr, rows, n_rows, stride_q, PACK, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(2 if LOOP == "split" else 1):
        start, stop = phase_span(begin, mid_begin, mid_end, end, phase, LOOP)
        for at in range(start, stop, BLOCK_N):
            n0 = phase_tile(at, mid_begin, mid_end, phase, LOOP)
            keys = n0 + tl.arange(0, BLOCK_N)
            k = load_rows(
                k_ptr, keys, n_keys, stride_k, 1, D, BLOCK_D, LOOP != "split" or phase == 1
            )  # [BLOCK_N, BLOCK_D]
            dots = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
            s, _slope = modified(
                dots, mods, rows[:, None], keys[None, :], n_rows, n_keys,
                PACK, BIAS, MASK, PADDING, SOFTCAP, FUSED, NATURAL,
            )  # fmt: skip
            s = within(
                s, keys[None, :], lo[:, None], hi[:, None], n0, mid_begin, mid_end, phase, LOOP
            )
            new_top = tl.maximum(top, tl.max(s, 1) * factor)
            p = powers(s, new_top[:, None], factor, NATURAL, PRECISION)
            shrink = powers(top, new_top, 1.0, NATURAL, PRECISION)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            top = new_top
            if DROPOUT:
                keep = dropout_keep(
                    seed, rows // PACK, head + rows % PACK, batch, n0, dropout_threshold,
                    BLOCK_M, BLOCK_N, False,
                )  # fmt: skip
                p = tl.where(keep, p, 0.0)
            v = load_rows(
                v_ptr, keys, n_keys, stride_v, 1, DV, BLOCK_DV, LOOP != "split" or phase == 1
            )  # [BLOCK_N, BLOCK_DV]
            acc = dot(rounded(p, v.dtype, PRECISION), v, acc, PRECISION)

    safe = tl.where(total == 0.0, 1.0, total)
    out = acc * (dropout_scale / safe)[:, None]
    store_rows(out_ptr, rows, n_rows, stride_out, out, PACK, DV, BLOCK_DV, PRECISION)
    lse = natural_lse(top, total, NATURAL, PRECISION)
    lse_ptr += (b * n_heads + h) * n_queries
    tl.store(lse_ptr + row_offsets(rows, (0, n_queries, 1), PACK), lse, mask=rows < n_rows)
