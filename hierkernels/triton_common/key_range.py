"""Key ranges in Triton kernels: bounds, their inverse, and the spans of tiles that need work.

A device staircase is the tuple (shift, step, rise, offset, floor) of hierkernels.key_range, in
canonical form: the numerator of the division is never negative, so truncation is the floor.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

import triton
import triton.language as tl

from hierkernels.key_range import KeyRange, Staircase

_LIMIT = 2**31
_LONG_STEP = 2**29


@triton.jit
def bound(i, stairs, n_keys):
    """The bound at query i, a scalar or a vector."""
    steps = (i + stairs[0]) // stairs[1]
    return tl.minimum(tl.maximum(steps * stairs[2] + stairs[3], stairs[4]), n_keys)


@triton.jit
def first_reaching(x, stairs, n_queries):
    """The smallest i in [0, n_queries] with bound(i) >= x, for 1 <= x <= n_keys."""
    need = tl.maximum(x - stairs[3], 0)
    rises = (need + stairs[2] - 1) // tl.maximum(stairs[2], 1)
    # No more rises than the queries can climb, so that rises * step cannot overflow.
    rises = tl.minimum(rises, (n_queries + stairs[0]) // stairs[1] + 1)
    i = tl.minimum(tl.maximum(rises * stairs[1] - stairs[0], 0), n_queries)
    flat = tl.where(need > 0, n_queries, 0)  # rise == 0: the bound never moves
    i = tl.where(stairs[2] > 0, i, flat)
    return tl.where(x <= stairs[4], 0, i)


@triton.jit
def key_spans(first, last, lo, hi, n_keys, TILE: tl.constexpr):
    """(begin, mid_begin, mid_end, end), multiples of TILE, for the queries first..last (inclusive).

    The key tiles in [mid_begin, mid_end) are seen whole by every query, those in
    [begin, mid_begin) and [mid_end, end) need a mask, all others are dead.
    """
    begin = bound(first, lo, n_keys) // TILE * TILE
    end = tl.maximum(tl.cdiv(bound(last, hi, n_keys), TILE) * TILE, begin)
    mid_begin = tl.minimum(tl.cdiv(bound(last, lo, n_keys), TILE) * TILE, end)
    mid_end = tl.maximum(bound(first, hi, n_keys) // TILE * TILE, mid_begin)
    return begin, mid_begin, mid_end, end


@triton.jit
def query_spans(first, last, lo, hi, n_queries, PACK: tl.constexpr, TILE: tl.constexpr):
    """The same for the rows (PACK rows a query) that see the keys first..last (inclusive)."""
    begin = first_reaching(first + 1, hi, n_queries) * PACK // TILE * TILE
    end = first_reaching(last + 1, lo, n_queries) * PACK
    end = tl.maximum(tl.cdiv(end, TILE) * TILE, begin)
    mid_begin = tl.cdiv(first_reaching(last + 1, hi, n_queries) * PACK, TILE) * TILE
    mid_begin = tl.minimum(mid_begin, end)
    mid_end = first_reaching(first + 1, lo, n_queries) * PACK // TILE * TILE
    return begin, mid_begin, tl.maximum(mid_end, mid_begin), end


# ---- the loop over a span ----
#
# LOOP "always": one loop, the range mask in every tile. "branch": one loop, an if round the mask
# alone, which keeps the pipelining. "split": two phases, an unmasked loop over the middle, then a
# masked loop over the edges, which jumps over the middle.


@triton.jit
def phase_span(begin, mid_begin, mid_end, end, PHASE: tl.constexpr, LOOP: tl.constexpr):
    """(start, stop) of the loop counter in a phase; there are loop_phases(LOOP) of them."""
    if LOOP != "split":
        return begin, end
    elif PHASE == 0:
        return mid_begin, mid_end
    else:
        return begin, end - (mid_end - mid_begin)


@triton.jit
def phase_tile(at, mid_begin, mid_end, PHASE: tl.constexpr, LOOP: tl.constexpr):
    """The first key (or row) of the tile that the loop counter stands for."""
    if LOOP == "split" and PHASE == 1:
        return tl.where(at < mid_begin, at, at + (mid_end - mid_begin))
    else:
        return at


@triton.jit
def within(scores, x, lo, hi, tile, mid_begin, mid_end, PHASE: tl.constexpr, LOOP: tl.constexpr):
    """scores, -inf where lo <= x < hi fails; x, lo, hi broadcast. Skipped in the middle tiles."""
    if LOOP == "branch":
        if (tile < mid_begin) | (tile >= mid_end):
            scores = tl.where((x >= lo) & (x < hi), scores, float("-inf"))
    elif LOOP == "always" or PHASE == 1:
        scores = tl.where((x >= lo) & (x < hi), scores, float("-inf"))
    return scores


# ---- host ----


def fit_int32(stairs: Staircase, n_queries: int, n_keys: int) -> Staircase | None:
    """The same bound over these lengths, all in 32 bits; None if there is no such form."""
    stairs = stairs.canonical()
    if n_queries + 2 * stairs.step >= _LIMIT:
        if n_queries > _LONG_STEP:
            return None
        # At most one step is within reach, that before query `until`; a shorter one does as well.
        until = stairs.step - stairs.shift
        shift = _LONG_STEP - until if until < n_queries else 0
        stairs = stairs._replace(shift=shift, step=_LONG_STEP)
    climb = (max(n_queries - 1, 0) + stairs.shift) // stairs.step * stairs.rise
    floor = min(stairs.floor, n_keys)
    if climb == 0 or stairs.offset >= n_keys:
        return Staircase(offset=min(max(stairs.offset, floor), n_keys))
    if stairs.offset + climb <= floor:
        return Staircase(offset=floor)
    if climb + 2 * stairs.rise + n_keys >= _LIMIT:
        return None
    return stairs._replace(floor=floor)


@functools.lru_cache(maxsize=1024)
def range_arguments(key_range: KeyRange, n_queries: int, n_keys: int) -> Mapping[str, int] | None:
    """The kernel arguments lo_shift ... hi_floor, LO_STEP and HI_STEP; None if beyond 32 bits."""
    arguments: dict[str, int] = {}
    for name, stairs in zip(("lo", "hi"), key_range, strict=True):
        fitted = fit_int32(stairs, n_queries, n_keys)
        if fitted is None:
            return None
        for part in ("shift", "rise", "offset", "floor"):
            arguments[f"{name}_{part}"] = getattr(fitted, part)
        arguments[f"{name.upper()}_STEP"] = fitted.step
    return MappingProxyType(arguments)  # remembered, and so not to be changed
