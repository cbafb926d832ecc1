"""The dropout generator in Triton kernels: the words of csrc/common/philox.h.

Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (j // 64 * 16 + j % 16, i, h, b);
key j takes word j // 16 % 4, a probability is kept iff its word reaches the threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_keep(
    seed,
    i,
    h,
    b,
    n0,
    j,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    ALIGNED: tl.constexpr = True,
):
    """True where a probability survives, for the keys j: [BLOCK_N].

    ALIGNED: these are n0 ... n0 + BLOCK_N - 1, and n0 is a multiple of BLOCK_N. i (query):
    [BLOCK_M], h (head) and b (batch): the same or a scalar. The tile is [BLOCK_M, BLOCK_N],
    and [BLOCK_N, BLOCK_M] with KEYS_FIRST.
    """
    # A tile of whole periods of 64 keys uses all four words of each counter, any other picks a
    # word for each key.
    WHOLE: tl.constexpr = ALIGNED and BLOCK_N % 64 == 0
    counter = n0 // 4 + tl.arange(0, BLOCK_N // 4) if WHOLE else j // 64 * 16 + j % 16
    if KEYS_FIRST:
        c0 = counter[:, None] + tl.zeros_like(i)[None, :]
        c1 = i[None, :] + tl.zeros_like(c0)
        c2 = (h + tl.zeros_like(i))[None, :] + tl.zeros_like(c0)
        c3 = (b + tl.zeros_like(i))[None, :] + tl.zeros_like(c0)
    else:
        c0 = counter[None, :] + tl.zeros_like(i)[:, None]
        c1 = i[:, None] + tl.zeros_like(c0)
        c2 = (h + tl.zeros_like(i))[:, None] + tl.zeros_like(c0)
        c3 = (b + tl.zeros_like(i))[:, None] + tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    least = threshold.to(tl.uint32)
    if WHOLE:
        even = tl.join((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
        odd = tl.join((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
        words = tl.join(even, odd)  # the last two axes count the words 2 * first + second
        if KEYS_FIRST:
            words = tl.reshape(words, [BLOCK_N // 64, 16, BLOCK_M, 4])
            keep = tl.reshape(tl.permute(words, (0, 3, 1, 2)), [BLOCK_N, BLOCK_M])
        else:
            words = tl.reshape(words, [BLOCK_M, BLOCK_N // 64, 16, 4])
            keep = tl.reshape(tl.permute(words, (0, 1, 3, 2)), [BLOCK_M, BLOCK_N])
        return keep != 0
    else:
        word = j // 16 % 4
        word = word[:, None] if KEYS_FIRST else word[None, :]
        bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        return bits >= least
