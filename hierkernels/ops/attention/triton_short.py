"""Plain attention over many short sequences: one program handles several of them.

A unit is one batch and one key/value head with its GROUP query heads: GROUP * Nq rows and Nk
keys. A tile holds as many whole units as fit, without padding in between, and the mask is block
diagonal. Everything fits one tile: the forward needs no loop, and one backward kernel recomputes
the probabilities and writes dq, dk and dv, summed over the group by the product itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.triton_common.key_range import bound
from hierkernels.triton_common.tiles import LOWEST, dot, natural_lse, rounded

UNSPECIALIZED = [
    "n_units", "n_kv_heads", "n_queries", "n_keys", "units_per_tile",
    "lo_shift", "lo_rise", "lo_offset", "lo_floor", "hi_shift", "hi_rise", "hi_offset", "hi_floor",
]  # fmt: skip


@triton.jit
def _element_offsets(batch, head, token, stride, BLOCK_D: tl.constexpr):
    """int64 [rows, BLOCK_D]; stride is (batch, head, token)."""
    at = batch.to(tl.int64) * stride[0] + head.to(tl.int64) * stride[1]
    at += token.to(tl.int64) * stride[2]
    return at[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _unit_rows(n_units, n_kv_heads, length, heads, units_per_tile, BLOCK: tl.constexpr):
    """(unit in the tile, batch, kv head, head in the unit, token, valid), each [BLOCK]."""
    rows = tl.arange(0, BLOCK)
    local = rows // (length * heads)
    unit = tl.program_id(0) * units_per_tile + local
    valid = (local < units_per_tile) & (unit < n_units)
    within = rows % (length * heads)
    return local, unit // n_kv_heads, unit % n_kv_heads, within // length, within % length, valid


@triton.jit
def _probabilities(
    q, k, score_scale, row_unit, row_token, key_unit, key_token, key_valid, lo, hi, n_keys,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(p, top, total): normalised [BLOCK_M, BLOCK_N], rows that see nothing all zeros; base 2."""
    scores = dot(q, tl.trans(k), None, PRECISION) * score_scale
    see = (row_unit[:, None] == key_unit[None, :]) & key_valid[None, :]
    see &= key_token[None, :] >= bound(row_token, lo, n_keys)[:, None]
    see &= key_token[None, :] < bound(row_token, hi, n_keys)[:, None]
    scores = tl.where(see, scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 1), LOWEST)
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, 1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None], top, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_short_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_out,
    score_scale,
    n_units,
    n_kv_heads,
    n_queries,
    n_keys,
    units_per_tile,
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
    PRECISION: tl.constexpr,
):
    """out and lse of one tile of units."""
    lo = (lo_shift, LO_STEP, lo_rise, lo_offset, lo_floor)
    hi = (hi_shift, HI_STEP, hi_rise, hi_offset, hi_floor)
    row_unit, batch, kv_head, member, token, row_valid = _unit_rows(
        n_units, n_kv_heads, n_queries, GROUP, units_per_tile, BLOCK_M
    )
    key_unit, key_batch, key_head, _, key_token, key_valid = _unit_rows(
        n_units, n_kv_heads, n_keys, 1, units_per_tile, BLOCK_N
    )
    head = kv_head * GROUP + member
    d_valid = tl.arange(0, BLOCK_D)[None, :] < D
    dv_valid = tl.arange(0, BLOCK_DV)[None, :] < DV
    q_at = _element_offsets(batch, head, token, stride_q, BLOCK_D)
    k_at = _element_offsets(key_batch, key_head, key_token, stride_k, BLOCK_D)
    v_at = _element_offsets(key_batch, key_head, key_token, stride_v, BLOCK_DV)
    q = tl.load(q_ptr + q_at, mask=row_valid[:, None] & d_valid, other=0.0)
    k = tl.load(k_ptr + k_at, mask=key_valid[:, None] & d_valid, other=0.0)
    v = tl.load(v_ptr + v_at, mask=key_valid[:, None] & dv_valid, other=0.0)
    p, top, total = _probabilities(
        q, k, score_scale, row_unit, token, key_unit, key_token, key_valid, lo, hi, n_keys,
        PRECISION,
    )  # fmt: skip
    out = dot(rounded(p, v.dtype, PRECISION), v, None, PRECISION)  # [BLOCK_M, BLOCK_DV]
    out_at = _element_offsets(batch, head, token, stride_out, BLOCK_DV)
    tl.store(
        out_ptr + out_at,
        rounded(out, out_ptr.dtype.element_ty, PRECISION),
        mask=row_valid[:, None] & dv_valid,
    )
    lse = natural_lse(top, total, False, PRECISION)
    lse_at = (batch.to(tl.int64) * (n_kv_heads * GROUP) + head) * n_queries + token
    tl.store(lse_ptr + lse_at, lse, mask=row_valid)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_short_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dlse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_dq,
    stride_dk,
    stride_dv,
    scale,
    score_scale,
    n_units,
    n_kv_heads,
    n_queries,
    n_keys,
    units_per_tile,
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
    DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk and dv of one tile of units; reads neither out nor lse."""
    lo = (lo_shift, LO_STEP, lo_rise, lo_offset, lo_floor)
    hi = (hi_shift, HI_STEP, hi_rise, hi_offset, hi_floor)
    row_unit, batch, kv_head, member, token, row_valid = _unit_rows(
        n_units, n_kv_heads, n_queries, GROUP, units_per_tile, BLOCK_M
    )
    key_unit, key_batch, key_head, _, key_token, key_valid = _unit_rows(
        n_units, n_kv_heads, n_keys, 1, units_per_tile, BLOCK_N
    )
    head = kv_head * GROUP + member
    row_mask = row_valid[:, None] & (tl.arange(0, BLOCK_D)[None, :] < D)
    row_mask_v = row_valid[:, None] & (tl.arange(0, BLOCK_DV)[None, :] < DV)
    key_mask = key_valid[:, None] & (tl.arange(0, BLOCK_D)[None, :] < D)
    key_mask_v = key_valid[:, None] & (tl.arange(0, BLOCK_DV)[None, :] < DV)
    q_at = _element_offsets(batch, head, token, stride_q, BLOCK_D)
    k_at = _element_offsets(key_batch, key_head, key_token, stride_k, BLOCK_D)
    q = tl.load(q_ptr + q_at, mask=row_mask, other=0.0)
    k = tl.load(k_ptr + k_at, mask=key_mask, other=0.0)
    p, _, total = _probabilities(
        q, k, score_scale, row_unit, token, key_unit, key_token, key_valid, lo, hi, n_keys,
        PRECISION,
    )  # fmt: skip

    do_at = _element_offsets(batch, head, token, stride_dout, BLOCK_DV)
    do = tl.load(dout_ptr + do_at, mask=row_mask_v, other=0.0)
    dv = dot(tl.trans(rounded(p, do.dtype, PRECISION)), do, None, PRECISION)
    dv_at = _element_offsets(key_batch, key_head, key_token, stride_dv, BLOCK_DV)
    tl.store(dv_ptr + dv_at, rounded(dv, dv_ptr.dtype.element_ty, PRECISION), mask=key_mask_v)

    v_at = _element_offsets(key_batch, key_head, key_token, stride_v, BLOCK_DV)
    v = tl.load(v_ptr + v_at, mask=key_mask_v, other=0.0)
    dp = dot(do, tl.trans(v), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    delta = tl.sum(p * dp, 1)  # = rowsum(out * dout)
    if DLSE:
        lse_at = (batch.to(tl.int64) * (n_kv_heads * GROUP) + head) * n_queries + token
        dlse = tl.load(dlse_ptr + lse_at, mask=row_valid, other=0.0)
        delta -= tl.where(total == 0.0, 0.0, dlse)
    ds = rounded(p * (dp - delta[:, None]), q.dtype, PRECISION)
    dq = dot(ds, k, None, PRECISION) * scale
    dq_at = _element_offsets(batch, head, token, stride_dq, BLOCK_D)
    tl.store(dq_ptr + dq_at, rounded(dq, dq_ptr.dtype.element_ty, PRECISION), mask=row_mask)
    dk = dot(tl.trans(ds), q, None, PRECISION) * scale
    dk_at = _element_offsets(key_batch, key_head, key_token, stride_dk, BLOCK_D)
    tl.store(dk_ptr + dk_at, rounded(dk, dk_ptr.dtype.element_ty, PRECISION), mask=key_mask)
