"""The kernels of the causal spatial gating unit.

Tokens lie in buckets of `size` (all N without a window); row r of a bucket sees the rows up to r of
its own, with weights from column OWN of the weight on, and with LOOK_BACK all of the bucket before,
with weights from column 0 on. A tile is some rows of a bucket and some channels of a head, of one
batch entry. Strides: of activations (batch, token), of the weight (head, row).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hierkernels.triton_common.activation import activate, slope
from hierkernels.triton_common.tiles import dot, rounded

# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
# Not `size`, `width` and `dim`: how many neighbours of a row are loaded together depends on them.
UNSPECIALIZED = ["batch", "n_tokens", "n_buckets", "heads", "items_of_split"]


@triton.jit
def _tile_of_program(n_rows, n_buckets, batch, dim, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row tile from the last on, bucket, batch entry, head, first channel of the head)."""
    program = tl.program_id(0)
    c_tiles = tl.cdiv(dim, BLOCK_C)
    m_tiles = tl.cdiv(n_rows, BLOCK_M)
    c0 = program % c_tiles * BLOCK_C
    b = program // c_tiles % batch
    rest = program // (c_tiles * batch)
    bucket = rest % n_buckets
    rest = rest // n_buckets
    return m_tiles - 1 - rest % m_tiles, bucket, b.to(tl.int64), (rest // m_tiles).to(tl.int64), c0


@triton.jit
def _load_activations(ptr, stride, first, rows, n_rows, channels, dim, OTHER: tl.constexpr = 0.0):
    """[rows, channels] of tokens first + rows; 0 past n_rows and dim."""
    at = (first + rows).to(tl.int64)[:, None] * stride[1] + channels[None, :]
    return tl.load(ptr + at, mask=(rows < n_rows)[:, None] & (channels < dim)[None, :], other=OTHER)


@triton.jit
def _as(w, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of the weight in the dtype of what it multiplies."""
    if w.dtype == dtype:
        return w
    else:
        return rounded(w, dtype, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _causal_sgu_forward_kernel(
    residual_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    gate_residual_ptr,
    out_ptr,
    z_ptr,
    stride_residual,
    stride_gate,
    stride_weight,
    stride_bias,
    stride_gate_residual,
    stride_out,
    batch,
    n_tokens,
    size,
    n_buckets,
    dim,
    own,
    LOOK_BACK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and, if z_ptr is given, the pre-activation z, of one tile."""
    tile, bucket, b, h, c0 = _tile_of_program(size, n_buckets, batch, dim, BLOCK_M, BLOCK_C)
    first = bucket * size
    n_rows = tl.minimum(n_tokens - first, size)
    m0 = tile * BLOCK_M
    if m0 >= n_rows:
        return
    rows = m0 + tl.arange(0, BLOCK_M)
    channels = c0 + tl.arange(0, BLOCK_C)
    terms = tl.arange(0, BLOCK_K)
    weight_ptr += h * stride_weight[0]
    weight_rows = weight_ptr + rows.to(tl.int64)[:, None] * stride_weight[1]
    gate_ptr += b * stride_gate[0] + h * dim
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if LOOK_BACK:
        for k0 in range(0, tl.where(bucket > 0, size, 0), BLOCK_K):
            k = k0 + terms
            w = tl.load(
                weight_rows + k[None, :],
                mask=(rows < n_rows)[:, None] & (k < size)[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            x = _load_activations(gate_ptr, stride_gate, first - size, k, size, channels, dim)
            acc = dot(_as(w, x.dtype, PRECISION), x, acc, PRECISION)
    # Before the diagonal all rows see a term: no mask along a row of weights, so 16 bytes at once.
    diagonal = m0 // BLOCK_K * BLOCK_K
    for k0 in range(0, diagonal, BLOCK_K):
        k = k0 + terms
        w = tl.load(weight_rows + own + k[None, :], mask=(rows < n_rows)[:, None], other=0.0)
        x = _load_activations(gate_ptr, stride_gate, first, k, n_rows, channels, dim)
        acc = dot(_as(w, x.dtype, PRECISION), x, acc, PRECISION)
    for k0 in range(diagonal, tl.minimum(m0 + BLOCK_M, n_rows), BLOCK_K):
        k = k0 + terms
        seen = (k[None, :] <= rows[:, None]) & (rows < n_rows)[:, None]
        w = tl.load(weight_rows + own + k[None, :], mask=seen, other=0.0)
        x = _load_activations(gate_ptr, stride_gate, first, k, n_rows, channels, dim)
        acc = dot(_as(w, x.dtype, PRECISION), x, acc, PRECISION)

    bias_at = bias_ptr + h * stride_bias[0] + rows.to(tl.int64) * stride_bias[1]
    bias = tl.load(bias_at, mask=rows < n_rows, other=0.0)
    z = acc + bias.to(tl.float32)[:, None]
    if gate_residual_ptr is not None:
        gate_residual_ptr += b * stride_gate_residual[0] + h * dim
        z += _load_activations(
            gate_residual_ptr, stride_gate_residual, first, rows, n_rows, channels, dim
        ).to(tl.float32)
    residual_ptr += b * stride_residual[0] + h * dim
    residual = _load_activations(
        residual_ptr, stride_residual, first, rows, n_rows, channels, dim
    ).to(tl.float32)
    at = b * stride_out[0] + h * dim
    at += (first + rows).to(tl.int64)[:, None] * stride_out[1] + channels[None, :]
    inside = (rows < n_rows)[:, None] & (channels < dim)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, rounded(z, z_ptr.dtype.element_ty, PRECISION), mask=inside)
    out = activate(z, ACTIVATION) * residual
    tl.store(out_ptr + at, rounded(out, out_ptr.dtype.element_ty, PRECISION), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _causal_sgu_backward_mix_kernel(
    residual_ptr,
    z_ptr,
    dout_ptr,
    dresidual_ptr,
    dmix_ptr,
    sums_ptr,
    stride_residual,
    stride_z,
    stride_dout,
    stride_dmix,
    n_tokens,
    heads,
    dim,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dresidual, dmix, and the sums of dmix (batch, token, head), of some tokens of a head."""
    program = tl.program_id(0)
    h = (program % heads).to(tl.int64)
    m_tiles = tl.cdiv(n_tokens, BLOCK_M)
    tokens = program // heads % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    b = (program // (heads * m_tiles)).to(tl.int64)
    residual_ptr += b * stride_residual[0] + h * dim
    z_ptr += b * stride_z[0] + h * dim
    dout_ptr += b * stride_dout[0] + h * dim
    total = tl.zeros([BLOCK_M], tl.float32)
    for c0 in range(0, dim, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        residual = _load_activations(residual_ptr, stride_residual, 0, tokens, n_tokens, c, dim)
        z = _load_activations(z_ptr, stride_z, 0, tokens, n_tokens, c, dim).to(tl.float32)
        dout = _load_activations(dout_ptr, stride_dout, 0, tokens, n_tokens, c, dim)
        dout = dout.to(tl.float32)
        dmix = dout * residual.to(tl.float32) * slope(z, ACTIVATION)
        total += tl.sum(dmix, 1)
        at = b * stride_dmix[0] + h * dim
        at += tokens.to(tl.int64)[:, None] * stride_dmix[1] + c[None, :]
        inside = (tokens < n_tokens)[:, None] & (c < dim)[None, :]
        tl.store(dmix_ptr + at, rounded(dmix, dmix_ptr.dtype.element_ty, PRECISION), mask=inside)
        if dresidual_ptr is not None:
            dresidual = rounded(
                dout * activate(z, ACTIVATION), dresidual_ptr.dtype.element_ty, PRECISION
            )
            tl.store(dresidual_ptr + at, dresidual, mask=inside)
    if sums_ptr is not None:
        to = (b * n_tokens + tokens) * heads + h
        tl.store(sums_ptr + to, total, mask=tokens < n_tokens)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _causal_sgu_backward_gate_kernel(
    weight_ptr,
    dmix_ptr,
    dgate_ptr,
    stride_weight,
    stride_dmix,
    stride_dgate,
    batch,
    n_tokens,
    size,
    n_buckets,
    dim,
    own,
    LOOK_BACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dgate of one tile: the transposed weight times dmix of the rows that see it."""
    tile, bucket, b, h, c0 = _tile_of_program(size, n_buckets, batch, dim, BLOCK_M, BLOCK_C)
    first = bucket * size
    n_rows = tl.minimum(n_tokens - first, size)
    m0 = tile * BLOCK_M
    if m0 >= n_rows:
        return
    rows = m0 + tl.arange(0, BLOCK_M)
    channels = c0 + tl.arange(0, BLOCK_C)
    terms = tl.arange(0, BLOCK_K)
    weight_ptr += h * stride_weight[0]
    dmix_ptr += b * stride_dmix[0] + h * dim
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    DIAGONAL: tl.constexpr = (BLOCK_M + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    for k0 in range(m0, tl.minimum(m0 + DIAGONAL, n_rows), BLOCK_K):
        k = k0 + terms
        seen = (k[:, None] >= rows[None, :]) & (k < n_rows)[:, None]
        at = k.to(tl.int64)[:, None] * stride_weight[1] + own + rows[None, :]
        w = tl.load(weight_ptr + at, mask=seen, other=0.0)  # [BLOCK_K, BLOCK_M]
        d = _load_activations(dmix_ptr, stride_dmix, first, k, n_rows, channels, dim)
        acc = dot(tl.trans(_as(w, d.dtype, PRECISION)), d, acc, PRECISION)
    for k0 in range(m0 + DIAGONAL, n_rows, BLOCK_K):  # these see all columns of the tile
        k = k0 + terms
        at = k.to(tl.int64)[:, None] * stride_weight[1] + own + rows[None, :]
        w = tl.load(weight_ptr + at, mask=(k < n_rows)[:, None], other=0.0)
        d = _load_activations(dmix_ptr, stride_dmix, first, k, n_rows, channels, dim)
        acc = dot(tl.trans(_as(w, d.dtype, PRECISION)), d, acc, PRECISION)
    if LOOK_BACK:
        n_next = tl.minimum(tl.maximum(n_tokens - first - size, 0), size)
        for k0 in range(0, n_next, BLOCK_K):
            k = k0 + terms
            at = k.to(tl.int64)[:, None] * stride_weight[1] + rows[None, :]
            w = tl.load(
                weight_ptr + at, mask=(k < n_next)[:, None] & (rows < n_rows)[None, :], other=0.0
            )
            d = _load_activations(dmix_ptr, stride_dmix, first + size, k, n_next, channels, dim)
            acc = dot(tl.trans(_as(w, d.dtype, PRECISION)), d, acc, PRECISION)
    at = b * stride_dgate[0] + h * dim
    at += (first + rows).to(tl.int64)[:, None] * stride_dgate[1] + channels[None, :]
    inside = (rows < n_rows)[:, None] & (channels < dim)[None, :]
    tl.store(dgate_ptr + at, rounded(acc, dgate_ptr.dtype.element_ty, PRECISION), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _causal_sgu_backward_weight_kernel(
    gate_ptr,
    dmix_ptr,
    dweight_ptr,
    stride_gate,
    stride_dmix,
    stride_dweight,
    batch,
    n_tokens,
    size,
    n_buckets,
    dim,
    heads,
    width,
    own,
    items_of_split,
    LOOK_BACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the weight's gradient, summed over a split of the (bucket, batch entry) items.

    stride_dweight is (split, head, row); `width` is the rows of the weight. The columns of the
    look-back, or those that nobody reads, come before `own`, in tiles of their own.
    """
    program = tl.program_id(0)
    m_tiles = tl.cdiv(width, BLOCK_M)
    n_tiles = tl.cdiv(width, BLOCK_N)
    halves = tl.where(own > 0, 2, 1)
    n_tile = program % (n_tiles * halves)
    rest = program // (n_tiles * halves)
    m0 = rest % m_tiles * BLOCK_M
    rest = rest // m_tiles
    h = (rest % heads).to(tl.int64)
    split = rest // heads
    is_own = n_tile // n_tiles == halves - 1
    n0 = n_tile % n_tiles * BLOCK_N
    rows = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    begin = split * items_of_split
    end = tl.minimum(begin + items_of_split, batch * n_buckets)
    if LOOK_BACK:
        begin = tl.where(is_own, begin, tl.maximum(begin, batch))  # the first bucket looks at none
        end = tl.where(is_own & (n0 > m0 + BLOCK_M - 1), begin, end)
    else:
        end = tl.where((n0 > m0 + BLOCK_M - 1) | (not is_own), begin, end)
    c_tiles = tl.cdiv(dim, BLOCK_C)
    gate_ptr += h * dim
    dmix_ptr += h * dim
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(begin * c_tiles, end * c_tiles):
        item = step // c_tiles
        bucket = item // batch
        b = (item % batch).to(tl.int64)
        c = step % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        first = bucket * size
        from_token = tl.where(is_own, first, first - size)
        n_rows = tl.minimum(n_tokens - first, size)
        d = _load_activations(
            dmix_ptr + b * stride_dmix[0], stride_dmix, first, rows, n_rows, c, dim
        )
        x = _load_activations(
            gate_ptr + b * stride_gate[0], stride_gate, from_token, columns,
            tl.where(is_own, n_rows, size), c, dim,
        )  # fmt: skip
        acc = dot(d, tl.trans(x), acc, PRECISION)
    seen = (columns[None, :] <= rows[:, None]) | (not is_own)
    acc = tl.where(seen, acc, 0.0)
    at = split.to(tl.int64) * stride_dweight[0] + h * stride_dweight[1]
    at += rows.to(tl.int64)[:, None] * stride_dweight[2] + tl.where(is_own, own, 0)
    inside = (rows < width)[:, None] & (columns < width)[None, :]
    tl.store(
        dweight_ptr + at + columns[None, :],
        rounded(acc, dweight_ptr.dtype.element_ty, PRECISION),
        mask=inside,
    )
