"""The kernels of block selection: tiles of scores, at once reduced to the best blocks.

A program owns a tile of queries of a head that chooses. By probabilities, its tiles of scores have
a column for each block, not for each window: the o-th window of every block of the tile is one
product, whose rows are added where the scores are, in registers. A window that reaches into two
blocks is multiplied twice; in return no sum goes across columns. The heads of a group take turns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.select_blocks.triton_ranking import (
    best_blocks,
    merge,
    score_of,
    store_ascending,
)
from hierkernels.triton_common.key_range import bound
from hierkernels.triton_common.tiles import LOG2E, dot, load_rows, powers

# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = [
    "n_heads", "n_queries", "n_windows", "n_blocks", "n_selected", "first_chunk", "query_offset",
    "num_initial", "num_local", "seen_shift", "seen_rise", "seen_offset", "seen_floor",
    "open_shift", "open_rise", "open_offset", "open_floor",
]  # fmt: skip
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _program_rows(n_queries, n_choosers, BLOCK_M: tl.constexpr):
    """(first query, batch, choosing head) of a program; late queries go first: they see most."""
    tiles = tl.cdiv(n_queries, BLOCK_M)
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    pair = tl.program_id(0) // tiles
    return m0, (pair // n_choosers).to(tl.int64), (pair % n_choosers).to(tl.int64)


@triton.jit
def _candidates(rows, blocks, n_open, n_queries, query_offset, BLOCK_SIZE, HOLE: tl.constexpr):
    """Whether a query may choose a block, [BLOCK_M, BLOCK_N]; n_open blocks of each row may be."""
    allowed = (blocks[None, :] < n_open[:, None]) & (rows < n_queries)[:, None]
    if HOLE:  # the own block is within the range, and is none
        allowed = allowed & (blocks[None, :] != ((rows + query_offset) // BLOCK_SIZE)[:, None])
    return allowed


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _select_blocks_probability_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    indices_ptr,
    stride_q,
    stride_k,
    score_scale,
    n_heads,
    n_queries,
    n_windows,
    n_blocks,
    n_selected,
    first_chunk,
    query_offset,
    num_initial,
    num_local,
    seen_shift,
    seen_rise,
    seen_offset,
    seen_floor,
    open_shift,
    open_rise,
    open_offset,
    open_floor,
    SEEN_STEP: tl.constexpr,
    OPEN_STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    WINDOWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HOLE: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The blocks of BLOCK_M queries by the probabilities of PACK heads that choose together.

    Blocks have WINDOWS strides, windows CHUNKS; first_chunk is the one that window 0 starts with.
    """
    m0, b, chooser = _program_rows(n_queries, n_heads // PACK, BLOCK_M)
    h = chooser * PACK
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    seen_stairs = (seen_shift, SEEN_STEP, seen_rise, seen_offset, seen_floor)
    open_stairs = (open_shift, OPEN_STEP, open_rise, open_offset, open_floor)
    rows = m0 + tl.arange(0, BLOCK_M)
    n_seen = bound(rows, seen_stairs, n_windows)  # [BLOCK_M] windows
    n_open = bound(rows, open_stairs, n_blocks)  # [BLOCK_M] blocks
    own = (rows + query_offset) // BLOCK_SIZE
    end = bound(tl.minimum(m0 + BLOCK_M, n_queries) - 1, open_stairs, n_blocks)
    factor = score_scale if FUSED else 1.0
    best = best_blocks(n_selected, BLOCK_M, BLOCK_TOP)
    for n0 in range(0, end, BLOCK_N):
        blocks = n0 + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for g in range(PACK):
            q_at = q_ptr + b * stride_q[0] + (h + g) * stride_q[1]
            q = load_rows(q_at, rows, n_queries, stride_q, 1, D, BLOCK_D, True)
            lse_at = lse_ptr + (b * n_heads + h + g) * n_queries
            lse = tl.load(lse_at + rows, mask=rows < n_queries, other=0.0)
            # A query that sees no window: exp(-inf) is 0.
            level = tl.where(lse == float("-inf"), float("inf"), lse if NATURAL else lse * LOG2E)
            for o in range(1 - CHUNKS, WINDOWS):
                windows = blocks * WINDOWS + o - first_chunk
                windows = tl.where(windows < 0, n_windows, windows)
                k = load_rows(k_ptr, windows, n_windows, stride_k, 1, D, BLOCK_D, True)
                s = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
                if not FUSED:
                    s = s * score_scale
                s = tl.where(windows[None, :] < n_seen[:, None], s, float("-inf"))
                shared = tl.minimum(WINDOWS - 1 - o, CHUNKS - 1) - tl.maximum(-o, 0) + 1
                p = powers(s, level[:, None], factor, NATURAL, PRECISION)
                scores += p * shared.to(tl.float32)
        # A score that is NaN counts as the least one, infinity is left to what is forced.
        scores = tl.where(scores == scores, tl.minimum(scores, _LARGEST), 0.0)
        forced = (blocks[None, :] > (own - num_local)[:, None]) & (blocks[None, :] <= own[:, None])
        forced = forced | (blocks < num_initial)[None, :]
        scores = tl.where(forced, float("inf"), scores)
        allowed = _candidates(rows, blocks, n_open, n_queries, query_offset, BLOCK_SIZE, HOLE)
        best = merge(best, scores, blocks, allowed)
    indices_ptr += (b * (n_heads // PACK) + chooser) * n_queries * n_selected
    store_ascending(indices_ptr, best, best == best, rows, n_queries, n_selected, BLOCK_TOP)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _select_blocks_logit_kernel(
    q_ptr,
    k_ptr,
    indices_ptr,
    stride_q,
    stride_k,
    score_scale,
    n_heads,
    n_queries,
    n_windows,
    n_blocks,
    n_selected,
    query_offset,
    open_shift,
    open_rise,
    open_offset,
    open_floor,
    OPEN_STEP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    WINDOWS: tl.constexpr,
    HOLE: tl.constexpr,
    NO_BLOCK_LOGIT: tl.constexpr,
    LEAST_PROBABILITY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The blocks of BLOCK_M queries by the logits of mean queries and mean windows.

    The means are float32 and so are their products: 16-bit ones would cost digits that decide.
    """
    m0, b, chooser = _program_rows(n_queries, n_heads // PACK, BLOCK_M)
    h = chooser * PACK
    k_ptr += b * stride_k[0] + h // GROUP * stride_k[1]
    open_stairs = (open_shift, OPEN_STEP, open_rise, open_offset, open_floor)
    rows = m0 + tl.arange(0, BLOCK_M)
    n_open = bound(rows, open_stairs, n_blocks)
    end = bound(tl.minimum(m0 + BLOCK_M, n_queries) - 1, open_stairs, n_blocks)
    q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for g in range(PACK):
        q_at = q_ptr + b * stride_q[0] + (h + g) * stride_q[1]
        q += load_rows(q_at, rows, n_queries, stride_q, 1, D, BLOCK_D, True).to(tl.float32)
    q = q / PACK
    best = best_blocks(n_selected, BLOCK_M, BLOCK_TOP)
    top = tl.full([BLOCK_M], NO_BLOCK_LOGIT, tl.float32)
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    for n0 in range(0, end, BLOCK_N):
        blocks = n0 + tl.arange(0, BLOCK_N)
        k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for o in range(WINDOWS):
            windows = blocks * WINDOWS + o
            k += load_rows(k_ptr, windows, n_windows, stride_k, 1, D, BLOCK_D, True).to(tl.float32)
        scores = dot(q, tl.trans(k / WINDOWS), None, PRECISION) * score_scale
        allowed = _candidates(rows, blocks, n_open, n_queries, query_offset, BLOCK_SIZE, HOLE)
        allowed = allowed & (scores == scores)
        scores = tl.where(allowed, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2((top - new_top) * LOG2E)
        total += tl.sum(tl.exp2((scores - new_top[:, None]) * LOG2E), 1)
        top = new_top
        best = merge(best, scores, blocks, allowed)
    p = tl.exp2((score_of(best) - top[:, None]) * LOG2E) / total[:, None]
    indices_ptr += (b * (n_heads // PACK) + chooser) * n_queries * n_selected
    kept = p > LEAST_PROBABILITY
    store_ascending(indices_ptr, best, kept, rows, n_queries, n_selected, BLOCK_TOP)
