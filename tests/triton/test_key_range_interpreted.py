"""The spans of random staircases against brute force, in interpreted kernels."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from hierkernels.key_range import KeyRange, Staircase
from hierkernels.ops.attention import reference
from hierkernels.ops.attention.spec import Case
from hierkernels.testing import make_inputs
from hierkernels.triton_common.key_range import (
    bound,
    first_reaching,
    fit_int32,
    key_spans,
    query_spans,
)
from hierkernels.triton_common.philox import dropout_keep

TILE = 8


@triton.jit
def _spans_kernel(
    spans_ptr,
    lo,
    hi,
    n_rows,
    n_queries,
    n_keys,
    PACK: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
):
    """KEYS: the key spans of each tile of rows, else the row spans of each tile of keys."""
    at = tl.program_id(0) * TILE
    if KEYS:
        last = (tl.minimum(at + TILE, n_rows) - 1) // PACK
        begin, mid_begin, mid_end, end = key_spans(at // PACK, last, lo, hi, n_keys, TILE)
    else:
        last = tl.minimum(at + TILE, n_keys) - 1
        begin, mid_begin, mid_end, end = query_spans(at, last, lo, hi, n_queries, PACK, TILE)
    spans_ptr += tl.program_id(0) * 4
    tl.store(spans_ptr, begin)
    tl.store(spans_ptr + 1, mid_begin)
    tl.store(spans_ptr + 2, mid_end)
    tl.store(spans_ptr + 3, end)


@triton.jit
def _bounds_kernel(at_ptr, first_ptr, stairs, n_queries, n_keys, BLOCK: tl.constexpr):
    """bound(i) for each query, and for each key j the first query whose bound exceeds j."""
    x = tl.arange(0, BLOCK)
    tl.store(at_ptr + x, bound(x, stairs, n_keys), mask=x < n_queries)
    tl.store(first_ptr + x, first_reaching(x + 1, stairs, n_queries), mask=x < n_keys)


def _random_range(draw: random.Random) -> KeyRange:
    lo = Staircase(
        draw.randint(-40, 40), draw.randint(1, 20), draw.randint(0, 20), draw.randint(-60, 20),
        draw.choice((0, 0, 3)),
    )  # fmt: skip
    hi = Staircase(
        draw.randint(-40, 40), draw.randint(1, 20), draw.randint(0, 20), draw.randint(-20, 60),
        draw.choice((0, 0, 5)),
    )  # fmt: skip
    return KeyRange(lo, hi)


@pytest.mark.parametrize("rows_first", [True, False], ids=["key-spans", "query-spans"])
def test_spans(rows_first: bool) -> None:
    """No visible tile is skipped, and exactly the tiles that need a mask have one."""
    draw = random.Random(0)
    for _ in range(40):
        n_queries, n_keys = draw.randint(1, 60), draw.randint(1, 60)
        pack, key_range = draw.choice((1, 1, 2, 3)), _random_range(draw)
        see = key_range.mask(n_queries, n_keys).repeat_interleave(pack, 0)
        grid = see if rows_first else see.T
        tiles = triton.cdiv(grid.shape[0], TILE)
        spans = torch.zeros(tiles, 4, dtype=torch.int32)
        lo, hi = (tuple(stairs) for stairs in key_range.canonical())
        _spans_kernel[(tiles,)](
            spans, lo, hi, n_queries * pack, n_queries, n_keys, PACK=pack, KEYS=rows_first,
            TILE=TILE,
        )  # fmt: skip
        for tile, (begin, mid_begin, mid_end, end) in enumerate(spans.tolist()):
            assert begin <= mid_begin <= mid_end <= end
            assert all(x % TILE == 0 for x in (begin, mid_begin, mid_end, end))
            for other in range(0, grid.shape[1], TILE):
                part = grid[tile * TILE : (tile + 1) * TILE, other : other + TILE]
                middle = mid_begin <= other < mid_end
                assert begin <= other < end or not part.any()
                assert part.all() or not middle
                assert middle or not (part.shape == (TILE, TILE) and part.all())


def test_bounds() -> None:
    """bound and its inverse, in 32 bits, are those of the definition in 64 bits."""
    draw = random.Random(1)
    wide = [
        Staircase(0, 1, 1, -(2**40)), Staircase(0, 1, 1, 2**40), Staircase(-(2**35), 2**33, 7, 3),
        Staircase(0, 2**30, 2**30, -(2**29)), Staircase(5, 2**31, 9, 4, 6), Staircase(-5, 2**31, 9),
    ]  # fmt: skip
    drawn = [stairs for _ in range(40) for stairs in _random_range(draw)]
    for stairs in wide + drawn:
        n_queries, n_keys = draw.randint(1, 60), draw.randint(1, 60)
        fitted = fit_int32(stairs, n_queries, n_keys)
        assert fitted is not None and all(abs(x) < 2**31 for x in fitted)
        at, first = torch.zeros(2, 64, dtype=torch.int32)
        _bounds_kernel[(1,)](at, first, tuple(fitted), n_queries, n_keys, BLOCK=64)
        expected = stairs.at(torch.arange(n_queries), n_keys)
        assert at[:n_queries].tolist() == expected.tolist(), stairs
        exceeds = expected[None, :] > torch.arange(n_keys)[:, None]
        expected = torch.where(exceeds.any(1), exceeds.int().argmax(1), n_queries)
        assert first[:n_keys].tolist() == expected.tolist(), stairs


def test_bounds_beyond_32_bits_are_refused() -> None:
    assert fit_int32(Staircase(0, 1, 2**30, -(2**31)), 8, 8) is None


@triton.jit
def _dropout_kernel(
    keep_ptr,
    seed_ptr,
    head,
    batch,
    n0,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """keep_ptr: (BLOCK_M, BLOCK_N) uint8."""
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr)
    keep = dropout_keep(seed, i, head, batch, n0, n0 + j, threshold, BLOCK_M, BLOCK_N, KEYS_FIRST)
    if KEYS_FIRST:
        ptrs = keep_ptr + i[None, :] * BLOCK_N + j[:, None]
    else:
        ptrs = keep_ptr + i[:, None] * BLOCK_N + j[None, :]
    tl.store(ptrs, keep.to(tl.uint8))


@pytest.mark.parametrize("keys_first", [False, True], ids=["rows-first", "keys-first"])
@pytest.mark.parametrize("block_n", [16, 128])
def test_dropout_mask(block_n: int, keys_first: bool) -> None:
    """Bit for bit the mask of the reference, with and without sharing the generator's words."""
    case = Case("mask", 2, 2, 2, 16, 256, 8, 8, dropout_p=0.6)
    call = make_inputs(case, torch.float32).call()
    expected = reference.dropout_keep(call)
    keep = torch.zeros(16, block_n, dtype=torch.uint8)
    for batch, head, n0 in ((0, 1, 0), (1, 0, 128)):
        _dropout_kernel[(1,)](
            keep, call.seed, head, batch, n0, int(0.6 * 2**32), BLOCK_M=16, BLOCK_N=block_n,
            KEYS_FIRST=keys_first,
        )  # fmt: skip
        assert torch.equal(keep.bool(), expected[batch, head, :, n0 : n0 + block_n])
