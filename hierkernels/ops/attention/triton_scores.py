"""What all attention kernels share: who owns which rows, and from products q . k to scores.

Scores are kept in base 2 (multiplied by log2(e)), for exp2, unless NATURAL: float32 keeps them as
they are, at the cost of a multiplication each, because logits of some hundreds lose a digit on the
way from lse to base 2 and back. Everything that modifies scores travels as one tuple, `mods`:

    (score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr,
     stride_padding)

whose pointers, after scores_at, stand at the batch and head of the program. A bias or mask
is "none", "keys" (the same for all rows of the tile: one vector is read), "full", or "slots" (a
bias alone: call.py says how it repeats; stride_bias then goes on with its width, before and slots).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.triton_common.tiles import LOG2E, tanh

# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = [
    "dropout_threshold", "n_heads", "n_queries", "n_keys", "n_stats",
    "lo_shift", "lo_rise", "lo_offset", "lo_floor", "hi_shift", "hi_rise", "hi_offset", "hi_floor",
]  # fmt: skip


@triton.jit
def program_rows(n_rows, n_heads, BLOCK_M: tl.constexpr, PACK: tl.constexpr):
    """(first row, batch, first head, slot) of a program that owns a tile of rows.

    A slot is one batch and PACK heads. Late rows go first: in causal patterns they see most keys.
    """
    tiles = tl.cdiv(n_rows, BLOCK_M)
    slots = n_heads // PACK
    slot = tl.program_id(0) // tiles
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    return m0, slot // slots, slot % slots * PACK, slot


@triton.jit
def scores_at(
    mods,
    b,
    h,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
):
    """mods with its pointers moved to batch b and head h (int64), absent ones being 0."""
    score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr, stride_p = mods
    # A device function can take None but, in some versions of Triton, not return it.
    bias_at, mask_at, padding_at = 0, 0, 0
    if BIAS != "none":
        bias_at = bias_ptr + b * stride_bias[0] + h * stride_bias[1]
    if MASK != "none":
        mask_at = mask_ptr + b * stride_mask[0] + h * stride_mask[1]
    if PADDING:
        padding_at = padding_ptr + b * stride_p[0]
    return score_scale, softcap, bias_at, stride_bias, mask_at, stride_mask, padding_at, stride_p


@triton.jit
def _load_pairs(ptr, stride, rows, keys, n_rows, n_keys, PACK: tl.constexpr, FORM: tl.constexpr):
    """Elements at (rows, keys), whose shapes broadcast; with FORM "keys" one for each key."""
    if FORM == "keys":
        return tl.load(ptr + keys.to(tl.int64) * stride[3], mask=keys < n_keys, other=0)
    else:
        i = rows // PACK
        ptrs = ptr + keys.to(tl.int64) * stride[3]
        if FORM == "slots":
            row = i % stride[4]
            first = i - row - stride[5]  # the key of slot 0
            inside = (keys >= first) & (keys < first + stride[6])
            ptrs += row.to(tl.int64) * stride[2] - first.to(tl.int64) * stride[3]
        else:
            inside = (rows < n_rows) & (keys < n_keys)
            ptrs += i.to(tl.int64) * stride[2]
        if PACK > 1:
            ptrs += (rows % PACK).to(tl.int64) * stride[1]
        return tl.load(ptrs, mask=inside, other=0)


@triton.jit
def modified(
    dots,
    mods,
    rows,
    keys,
    n_rows,
    n_keys,
    PACK: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """(scores, slope): scaled, capped and biased, -inf where masked, and d capped / d scaled.

    rows and keys are int32 tiles that broadcast to dots. FUSED: the scores stay unscaled, the
    caller multiplies them by `score_factor` in the exponent's fused multiply-add.
    """
    score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr, stride_p = mods
    slope = 1.0
    scores = dots
    if SOFTCAP:
        t = tanh(dots * score_scale)
        scores = t * softcap
        slope = 1.0 - t * t
    elif not FUSED:
        scores = dots * score_scale
    if BIAS != "none":
        bias = _load_pairs(bias_ptr, stride_bias, rows, keys, n_rows, n_keys, PACK, BIAS)
        scores += bias.to(tl.float32) * (1.0 if NATURAL else LOG2E)
    if MASK != "none":
        may = _load_pairs(mask_ptr, stride_mask, rows, keys, n_rows, n_keys, PACK, MASK)
        scores = tl.where(may != 0, scores, float("-inf"))
    if PADDING:
        real = tl.load(padding_ptr + keys.to(tl.int64) * stride_p[1], mask=keys < n_keys, other=0)
        scores = tl.where(real != 0, scores, float("-inf"))
    return scores, slope


@triton.jit
def score_factor(mods, FUSED: tl.constexpr):
    """What the scores are still to be multiplied by."""
    if FUSED:
        return mods[0]
    else:
        return 1.0
