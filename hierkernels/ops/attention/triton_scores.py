"""From products q . k to scores, in all attention kernels.

Scores are kept in base 2 (multiplied by log2(e)), for exp2, unless NATURAL: float32 keeps them as
they are, at the cost of a multiplication each, because logits of some hundreds lose a digit on the
way from lse to base 2 and back. Everything that modifies scores travels as one tuple, `mods`:

    (score_scale, softcap, bias_ptr, stride_bias, mask_ptr, stride_mask, padding_ptr,
     stride_padding)

whose pointers, after scores_at, stand at the batch and head that places (triton_places.py) are
relative to. A bias or mask
is "none", "keys" (the same for all rows that see a key: one vector is read), "full", or "slots" (a
bias alone: call.py says how it repeats; stride_bias then goes on with its width, before and slots).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.ops.attention.triton_places import key_places, offsets, row_places, same_item
from hierkernels.triton_common.tiles import LOG2E, tanh


@triton.jit
def whole_vectors(n_keys):
    """n_keys, a multiple of 16: now the compiler knows, and loads 8 elements of a row at once.

    As a specialisation it would double the kernels of calls without a bias or mask as well.
    """
    return n_keys // 16 * 16


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
def _load_pairs(
    ptr,
    stride,
    rows,
    columns,
    slot,
    PACK: tl.constexpr,
    SEVERAL: tl.constexpr,
    FORM: tl.constexpr,
):
    """Elements at (rows, columns), whose shapes broadcast; with FORM "keys" one a column."""
    key = key_places(columns, slot, PACK, SEVERAL)
    if FORM == "keys":
        at = offsets(key, (stride[0], stride[1], stride[3]), 1, SEVERAL)
        return tl.load(ptr + at, mask=columns < slot[2], other=0)
    else:
        row = row_places(rows, slot, PACK, SEVERAL)
        ptrs = ptr + key[2].to(tl.int64) * stride[3]
        inside = same_item(rows, columns, slot, PACK, SEVERAL)
        if FORM == "slots":
            in_bucket = row[2] % stride[4]
            first = row[2] - in_bucket - stride[5]  # the key of slot 0
            inside = (key[2] >= first) & (key[2] < first + stride[6])
            if SEVERAL:
                inside = inside & same_item(rows, columns, slot, PACK, SEVERAL)
            row = (row[0], row[1], in_bucket)
            ptrs += offsets(row, stride, PACK, SEVERAL) - first.to(tl.int64) * stride[3]
        else:
            ptrs += offsets(row, stride, PACK, SEVERAL)
        return tl.load(ptrs, mask=inside, other=0)


@triton.jit
def modified(
    dots,
    mods,
    rows,
    columns,
    slot,
    PACK: tl.constexpr,
    SEVERAL: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FUSED: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """(scores, slope): scaled, capped and biased, -inf where masked, and d capped / d scaled.

    rows and columns are int32 tiles that broadcast to dots. FUSED: the scores stay unscaled, the
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
        bias = _load_pairs(bias_ptr, stride_bias, rows, columns, slot, PACK, SEVERAL, BIAS)
        scores += bias.to(tl.float32) * (1.0 if NATURAL else LOG2E)
    if MASK != "none":
        may = _load_pairs(mask_ptr, stride_mask, rows, columns, slot, PACK, SEVERAL, MASK)
        scores = tl.where(may != 0, scores, float("-inf"))
    if PADDING:
        at = offsets(
            key_places(columns, slot, PACK, SEVERAL), (stride_p[0], 0, stride_p[1]), 1, SEVERAL
        )
        real = tl.load(padding_ptr + at, mask=columns < slot[2], other=0)
        scores = tl.where(real != 0, scores, float("-inf"))
    return scores, slope


@triton.jit
def score_factor(mods, FUSED: tl.constexpr):
    """What the scores are still to be multiplied by."""
    if FUSED:
        return mods[0]
    else:
        return 1.0
