"""The gradient of a bias that batches or heads share, (1|B, 1|Hq, Nq, Nk), or buckets, by slots.

A program owns one tile of one (batch, head) of the bias and adds up ds, recomputed, over the
pairs that share it: one writer an element, a fixed order, nothing of size (B, Hq, Nq, Nk). When
few tiles would leave the device idle, the pairs are cut into slices, each with its own partial
sum; the slices are added afterwards.

With SEVERAL, several pairs of short sequences are added up side by side, as they lie in a slot
(triton_places.py), and leave a partial sum each. Then a bias with one row for all queries is summed
here as well.

For a bias by slots, (1, Hq, w, slots), what shares an element are batches and buckets: from bucket
to bucket the tile moves along the diagonal of the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.attention.triton_places import (
    UNSPECIALIZED,
    key_places,
    offsets,
    row_bound,
    row_places,
)
from hierkernels.ops.attention.triton_scores import (
    modified,
    score_factor,
    scores_at,
    whole_vectors,
)
from hierkernels.triton_common.key_range import key_spans
from hierkernels.triton_common.philox import dropout_keep
from hierkernels.triton_common.tiles import dot, load_tile, powers


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "bias_batches", "bias_heads", "bias_rows", "slices"])
def _attention_backward_dbias_kernel(
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
    dbias_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_bias,
    stride_mask,
    stride_padding,
    stride_dout,
    score_scale,
    softcap,
    dropout_threshold,
    dropout_scale,
    n_batches,
    n_heads,
    n_queries,
    n_keys,
    n_stats,
    bias_batches,
    bias_heads,
    bias_rows,
    slices,
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
    SEVERAL: tl.constexpr,
    ONE_ROW: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dbias (slices, *shape of the bias), float32 and contiguous."""
    if EVEN:
        n_keys = whole_vectors(n_keys)
    lo_stairs = (lo_shift, LO_STEP, lo_rise, lo_offset, lo_floor)
    hi_stairs = (hi_shift, HI_STEP, hi_rise, hi_offset, hi_floor)
    n_rows = bias_rows
    n_columns = n_keys
    n_buckets = 1
    before = 0
    if BIAS == "slots":
        before = stride_bias[5]
        n_columns = stride_bias[6]
        n_buckets = tl.cdiv(n_queries, n_rows)
    if SEVERAL:
        n_rows = items_of_slot * n_queries
        n_columns = items_of_slot * n_keys
    tiles_n = tl.cdiv(n_columns, BLOCK_N)
    tiles = tl.cdiv(n_rows, BLOCK_M) * tiles_n
    tile = tl.program_id(0) % tiles
    owner = tl.program_id(0) // tiles  # (slice, batch of the bias, head of the bias)
    bias_head = owner % bias_heads
    bias_batch = owner // bias_heads % bias_batches
    part = owner // bias_heads // bias_batches
    m0 = tile // tiles_n * BLOCK_M
    n0 = tile % tiles_n * BLOCK_N
    tile_rows = m0 + tl.arange(0, BLOCK_M)  # of the bias
    tile_columns = n0 + tl.arange(0, BLOCK_N)

    shared_heads = n_heads // bias_heads
    n_pairs = n_batches // bias_batches * shared_heads * n_buckets
    pair_begin = (n_pairs.to(tl.int64) * part // slices).to(tl.int32)
    pair_end = (n_pairs.to(tl.int64) * (part + 1) // slices).to(tl.int32)
    if BIAS != "slots" and not SEVERAL:
        last = tl.minimum(m0 + BLOCK_M, n_queries) - 1
        begin, _mid_begin, _mid_end, end = key_spans(
            m0, last, lo_stairs, hi_stairs, n_keys, BLOCK_N
        )
        pair_end = tl.where((n0 >= begin) & (n0 < end), pair_end, pair_begin)  # dead: stays zero
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for shared in range(pair_begin, pair_end, items_of_slot):
        # A shared dimension has one index in the bias, so that index and counter simply add up.
        pair = shared // n_buckets
        batch = bias_batch
        head = bias_head
        row0 = shared % n_buckets * n_rows  # 0 unless by slots
        if SEVERAL:
            items = tl.minimum(items_of_slot, pair_end - shared)
            slot = (shared, items * n_queries, items * n_keys, shared_heads, n_queries, n_keys)
            row0 = 0
        else:
            batch += pair // shared_heads
            head += pair % shared_heads
            slot = (0, n_queries, n_keys, n_heads, n_queries, n_keys)
        rows = row0 + tile_rows
        keys = row0 - before + tile_columns
        lo = row_bound(rows, lo_stairs, slot, 1, SEVERAL)[:, None]
        hi = row_bound(rows, hi_stairs, slot, 1, SEVERAL)[:, None]
        inside = (keys[None, :] >= lo) & (keys[None, :] < hi)  # [BLOCK_M, BLOCK_N]
        row = row_places(rows, slot, 1, SEVERAL)
        key = key_places(keys, slot, 1, SEVERAL)
        if DROPOUT:
            keep = dropout_keep(
                seed, row[2], head + row[1], batch + row[0], row0 - before + n0, key[2],
                dropout_threshold, BLOCK_M, BLOCK_N, False, BIAS != "slots" and not SEVERAL,
            )  # fmt: skip
        if BIAS == "slots":
            keys = tl.where(keys < 0, n_keys, keys)  # as those past the end, not read
            key = key_places(keys, slot, 1, SEVERAL)
        is_row = rows < slot[1]
        is_key = keys < slot[2]
        b = batch.to(tl.int64)
        h = head.to(tl.int64)
        q_at = b * stride_q[0] + h * stride_q[1] + offsets(row, stride_q, 1, SEVERAL)
        do_at = b * stride_dout[0] + h * stride_dout[1] + offsets(row, stride_dout, 1, SEVERAL)
        if SEVERAL:
            # From the head that the bias starts with to that of the pair.
            key = (key[0], (head + key[1]) // GROUP - head // GROUP, key[2])
        k_at = b * stride_k[0] + h // GROUP * stride_k[1] + offsets(key, stride_k, 1, SEVERAL)
        v_at = b * stride_v[0] + h // GROUP * stride_v[1] + offsets(key, stride_v, 1, SEVERAL)
        mods = scores_at(
            (score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr,
             stride_padding),
            b, h, BIAS, MASK, PADDING,
        )  # fmt: skip
        q = load_tile(q_ptr, q_at, is_row, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
        k = load_tile(k_ptr, k_at, is_key, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        do = load_tile(dout_ptr, do_at, is_row, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
        v = load_tile(v_ptr, v_at, is_key, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
        stats = (b * n_heads + h) * n_stats
        stats += offsets(row, (n_heads * n_stats, n_stats, 1), 1, SEVERAL)
        level = tl.load(level_ptr + stats, mask=is_row, other=float("inf"))
        delta = tl.load(delta_ptr + stats, mask=is_row, other=0.0)
        s, _slope = modified(
            dot(q, tl.trans(k), None, PRECISION), mods, rows[:, None], keys[None, :], slot,
            1, SEVERAL, BIAS, MASK, PADDING, SOFTCAP, FUSED, NATURAL,
        )  # fmt: skip
        s = tl.where(inside, s, float("-inf"))
        factor = score_factor(mods, FUSED)
        p = powers(s, level[:, None], factor, NATURAL, PRECISION)
        dp = dot(do, tl.trans(v), None, PRECISION)
        if DROPOUT:
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        acc += p * (dp - delta[:, None])
    mask = (tile_rows < n_rows)[:, None] & (tile_columns < n_columns)[None, :]
    if SEVERAL:
        item = tile_columns // n_keys
        bias_at = (part * items_of_slot + item) * bias_batches + bias_batch
        bias_at = bias_at * bias_heads + bias_head
        at = bias_at.to(tl.int64) * bias_rows * n_keys + tile_columns % n_keys
        if ONE_ROW:
            tl.store(dbias_ptr + at, tl.sum(acc, 0), mask=tile_columns < n_columns)
        else:
            mask = mask & ((tile_rows // n_queries)[:, None] == item[None, :])
            at = at[None, :] + (tile_rows % n_queries * n_keys)[:, None]
            tl.store(dbias_ptr + at, acc, mask=mask)
    else:
        at = (owner.to(tl.int64) * n_rows + tile_rows[:, None]) * n_columns + tile_columns[None, :]
        tl.store(dbias_ptr + at, acc, mask=mask)
