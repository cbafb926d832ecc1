"""Tiles in Triton kernels: packed rows, masked loads and stores, products, tanh.

Row r of a tile is query r // PACK of head r % PACK: with PACK = G the heads that share a
key/value head are rows of one tile, with PACK = 1 each head has its own tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# ln(2) = LN2 + LN2_TAIL, LN2 being the nearest float32.
LN2 = tl.constexpr(0.6931471824645996)
LN2_TAIL = tl.constexpr(-1.904654299957768e-09)
# Where a running maximum starts: finite, so that no difference is ever inf - inf.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def program_part(n_parts, PARTS: tl.constexpr):
    """(the program among those that own rows, the part of its work) of this program."""
    if PARTS:
        return tl.program_id(0) // n_parts, tl.program_id(0) % n_parts
    else:
        return tl.program_id(0), 0


@triton.jit
def row_offsets(rows, stride, PACK: tl.constexpr):
    """int64 offsets of packed rows; stride is (batch, head, token)."""
    if PACK == 1:
        return rows.to(tl.int64) * stride[2]
    else:
        return (rows // PACK).to(tl.int64) * stride[2] + (rows % PACK).to(tl.int64) * stride[1]


@triton.jit
def load_tile(ptr, at, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr):
    """The [rows, BLOCK_D] elements whose rows start at offsets `at`; columns from D on are zero.

    TAIL: rows may be invalid, and are zero then.
    """
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + at[:, None] + d[None, :]
    if TAIL and BLOCK_D > D:
        return tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    elif TAIL:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    elif BLOCK_D > D:
        return tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(
    ptr, at, valid, tile, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """Stores the first D columns of valid rows, rounded to the pointer's type."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (d < D)[None, :]
    tile = rounded(tile, ptr.dtype.element_ty, PRECISION)
    tl.store(ptr + at[:, None] + d[None, :], tile, mask=mask)


@triton.jit
def load_rows(
    ptr,
    rows,
    n_rows,
    stride,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A [rows, BLOCK_D] tile of packed rows. TAIL: rows may lie past n_rows."""
    return load_tile(ptr, row_offsets(rows, stride, PACK), rows < n_rows, D, BLOCK_D, TAIL)


@triton.jit
def store_rows(
    ptr,
    rows,
    n_rows,
    stride,
    tile,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the first D columns of the packed rows before n_rows."""
    store_tile(ptr, row_offsets(rows, stride, PACK), rows < n_rows, tile, D, BLOCK_D, PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """float32 x in dtype. The interpreter ("emulated") truncates bfloat16: round its bits first."""
    if PRECISION == "emulated" and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def multiply_add(x, y, z, PRECISION: tl.constexpr):
    """x * y + z in float32, rounded once; the interpreter's fma would round twice."""
    if PRECISION == "emulated":
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; acc may be None. The interpreter ("emulated") would multiply bfloat16 bits."""
    if PRECISION == "emulated":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def powers(scores, level, factor, NATURAL: tl.constexpr, PRECISION: tl.constexpr):
    """e**(score - level), or 2**(score * factor - level) unless NATURAL; shapes broadcast."""
    if NATURAL:
        return tl.exp2((scores - level) * LOG2E)
    else:
        return tl.exp2(multiply_add(scores, factor, -level, PRECISION))


@triton.jit
def natural_lse(top, total, NATURAL: tl.constexpr, PRECISION: tl.constexpr):
    """ln(2**top * total) or, if NATURAL, ln(e**top * total); -inf where total is 0.

    Rounded once, however large top is.
    """
    rest = tl.log2(tl.where(total == 0.0, 1.0, total)) * LN2
    if NATURAL:
        lse = top + rest
    else:
        lse = multiply_add(top, LN2, multiply_add(top, LN2_TAIL, rest, PRECISION), PRECISION)
    return tl.where(total == 0.0, float("-inf"), lse)


@triton.jit
def tanh(x):
    """tanh to float32 precision, small arguments included (Cephes' tanhf)."""
    z = x * x
    small = -5.70498872745e-3
    small = small * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    small = small * z * x + x
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|), at most 1
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


# ---- host ----
#
# Triton's own cdiv and next_power_of_2 serve kernels as well, and take 3 microseconds each.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is no less than n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def padded(channels: int) -> int:
    """BLOCK_D of so many channels."""
    return max(16, power_of_2(channels))


def rows_stride(t: torch.Tensor) -> tuple[int, ...]:
    """(batch, head, token) strides; that of the channels is 1."""
    return t.stride()[:3]
