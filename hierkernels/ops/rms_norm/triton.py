"""Root-mean-square norm in Triton: a tile holds whole rows, so each tensor is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import cdiv, power_of_2, rounded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether the kernels are interpreted is settled when this module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = ["n_rows", "tokens", "n_tiles"]
_ELEMENTS = 2048  # of a tile, of which a program holds up to four: 16 a thread, with 4 warps
_MAX_TILE = 8192  # channels that a tile holds; longer rows are read twice
_CHUNK = 2048  # channels of a tile of such rows
# The gradient of the weight is summed in so many parts at most, which are then added in order.
_PARTS = 512


@triton.jit
def _places(
    rows, c0, n_rows, tokens, shift, kept,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a tile [BLOCK_M, BLOCK_C]: its addresses, where they come from, whether that is there."""
    c = c0 + tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (c < C)[None, :]
    own = rows.to(tl.int64)[:, None] * C + c[None, :]
    delayed = (c >= kept)[None, :]
    source = own - tl.where(delayed, shift, 0).to(tl.int64) * C
    seen = inside & ((rows % tokens >= shift)[:, None] | (c < kept)[None, :])
    return own, source, inside, seen


@triton.jit
def _load_weight(ptr, c0, C: tl.constexpr, BLOCK_C: tl.constexpr):
    c = c0 + tl.arange(0, BLOCK_C)
    return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_sum_kernel(
    x_ptr, weight_ptr, dout_ptr, sum_ptr, n_rows, tokens, shift, kept,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a long row the sum of squares, or of x weight dout if that is given; BLOCK_M is 1."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        own, source, inside, seen = _places(
            rows, c0, n_rows, tokens, shift, kept, C, BLOCK_M, BLOCK_C
        )
        s = tl.load(x_ptr + source, mask=seen, other=0.0).to(tl.float32)
        other = s
        if dout_ptr is not None:
            other = tl.load(dout_ptr + own, mask=inside, other=0.0).to(tl.float32)
            other *= _load_weight(weight_ptr, c0, C, BLOCK_C)[None, :]
        total += s * other
    tl.store(sum_ptr + rows, tl.sum(total, axis=1), mask=rows < n_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, out_ptr, inverse_ptr, sum_ptr, n_rows, tokens, shift, kept, n_chunks,
    floor, addend, scale,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out of BLOCK_M rows, and what they are multiplied with; a chunk of them if sums are given."""
    c0 = tl.program_id(0) % n_chunks * BLOCK_C
    rows = tl.program_id(0) // n_chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    own, source, inside, seen = _places(rows, c0, n_rows, tokens, shift, kept, C, BLOCK_M, BLOCK_C)
    s = tl.load(x_ptr + source, mask=seen, other=0.0).to(tl.float32)
    weight = _load_weight(weight_ptr, c0, C, BLOCK_C)
    if sum_ptr is None:
        squares = tl.sum(s * s, axis=1)
    else:
        squares = tl.load(sum_ptr + rows, mask=rows < n_rows, other=0.0)
    length = tl.sqrt(squares + addend)
    # NaN stays NaN.
    inverse = 1.0 / tl.where(length < floor, floor, length)
    # Of several chunks the first one stores.
    tl.store(inverse_ptr + rows, inverse, mask=rows < tl.where(c0 == 0, n_rows, 0))
    out = s * (inverse * scale)[:, None] * weight[None, :]
    tl.store(out_ptr + own, rounded(out, out_ptr.dtype.element_ty, PRECISION), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_backward_kernel(
    x_ptr, weight_ptr, inverse_ptr, sum_ptr, dout_ptr, dx_ptr, parts_ptr,
    n_rows, tokens, shift, kept, n_chunks, floor, scale, n_tiles,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of n_tiles tiles of rows, and their part of dweight; of a chunk if sums are given."""
    c0 = tl.program_id(0) % n_chunks * BLOCK_C
    number = tl.program_id(0) // n_chunks
    c = c0 + tl.arange(0, BLOCK_C)
    weight = _load_weight(weight_ptr, c0, C, BLOCK_C)
    part = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(n_tiles):
        rows = (number * n_tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        own, source, inside, seen = _places(
            rows, c0, n_rows, tokens, shift, kept, C, BLOCK_M, BLOCK_C
        )
        s = tl.load(x_ptr + source, mask=seen, other=0.0).to(tl.float32)
        grad = tl.load(dout_ptr + own, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + rows, mask=rows < n_rows, other=0.0)
        factor = (inverse * scale)[:, None]
        part += tl.sum(grad * s * factor, axis=0)
        grad *= weight[None, :]
        if sum_ptr is None:
            along = tl.sum(grad * s, axis=1)
        else:
            along = tl.load(sum_ptr + rows, mask=rows < n_rows, other=0.0)
        along *= inverse * inverse
        # Below the floor the length has no effect.
        along = tl.where(inverse * floor >= 1.0, 0.0, along)
        dx = (grad - s * along[:, None]) * factor
        tl.store(dx_ptr + source, rounded(dx, dx_ptr.dtype.element_ty, PRECISION), mask=seen)
        # What no later token reads.
        last = (rows % tokens >= tokens - shift)[:, None] & (c >= kept)[None, :]
        tl.store(dx_ptr + own, tl.zeros_like(dx).to(dx_ptr.dtype.element_ty), mask=inside & last)
    tl.store(parts_ptr + number.to(tl.int64) * C + c, part, mask=c < C)


# ---- launchers ----


def _arguments(call: NormCall, target: Target) -> dict[str, Any]:
    """What all kernels take."""
    B, N, C = call.x.shape
    block_c = power_of_2(C)
    if block_c > _MAX_TILE:
        block_c = _CHUNK
    return {
        "x_ptr": call.x, "weight_ptr": call.weight, "n_rows": B * N, "tokens": N,
        "shift": call.shift, "kept": call.kept, "C": C, "BLOCK_C": block_c,
        "BLOCK_M": max(_ELEMENTS // block_c, 1), "PRECISION": target.precision,
        "num_warps": 4 if block_c <= 4096 else 8, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def _sums(
    call: NormCall, target: Target, dout: torch.Tensor | None
) -> tuple[list[Launch], torch.Tensor | None]:
    """(the launch that sums over long rows, what it fills), nothing for rows that a tile holds."""
    arguments = _arguments(call, target)
    if arguments["BLOCK_C"] >= arguments["C"]:
        return [], None
    sums = call.x.new_empty(arguments["n_rows"], dtype=torch.float32)
    arguments |= {"dout_ptr": dout, "sum_ptr": sums}
    programs = cdiv(arguments["n_rows"], arguments["BLOCK_M"])
    return [Launch(_rms_norm_sum_kernel, programs, arguments)], sums


def plan_forward(
    call: NormCall, target: Target, out: torch.Tensor, inverse: torch.Tensor
) -> list[Launch]:
    """The launches that fill out and inverse; they are not empty."""
    arguments = _arguments(call, target)
    launches, sums = _sums(call, target, None)
    chunks = cdiv(arguments["C"], arguments["BLOCK_C"])
    arguments |= {
        "out_ptr": out, "inverse_ptr": inverse, "sum_ptr": sums, "n_chunks": chunks,
        "floor": call.floor, "addend": call.addend, "scale": call.scale,
    }  # fmt: skip
    programs = cdiv(arguments["n_rows"], arguments["BLOCK_M"]) * chunks
    return [*launches, Launch(_rms_norm_forward_kernel, programs, arguments)]


def plan_backward(
    call: NormCall, target: Target, inverse: torch.Tensor, dout: torch.Tensor, dx: torch.Tensor
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill dx and the parts of dweight, and these (parts, C)."""
    arguments = _arguments(call, target)
    launches, sums = _sums(call, target, dout)
    tiles = cdiv(arguments["n_rows"], arguments["BLOCK_M"])
    each = cdiv(tiles, _PARTS)
    parts = inverse.new_empty(cdiv(tiles, each), call.x.shape[2])
    chunks = cdiv(arguments["C"], arguments["BLOCK_C"])
    arguments |= {
        "inverse_ptr": inverse, "sum_ptr": sums, "dout_ptr": dout, "dx_ptr": dx,
        "parts_ptr": parts, "n_tiles": each, "n_chunks": chunks, "floor": call.floor,
        "scale": call.scale,
    }  # fmt: skip
    programs = len(parts) * chunks
    return [*launches, Launch(_rms_norm_backward_kernel, programs, arguments)], parts


# ---- the backend ----


def supports(call: NormCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("x", call.x, INTERPRETED)
    if call.x.dtype not in _DTYPES:
        reasons.append(f"dtype {call.x.dtype} is not one of float32, bfloat16, float16")
    B, N, C = call.x.shape
    chunks = C // _CHUNK + 1
    # The last program of the backward may count rows that are not there, up to B N / _PARTS.
    if max(B * N * chunks, call.shift) >= 2**31 - 2**23 or C >= 2**31 - 2**16:
        reasons.append("sizes beyond 32 bits")
    return reasons


def forward(call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, inverse)."""
    out, inverse = call.new_outputs()
    if out.numel():
        for launch in plan_forward(call, target_of(call.x, INTERPRETED), out, inverse):
            launch.run()
    return out, inverse


def backward(
    call: NormCall, inverse: torch.Tensor, dout: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x and of weight; one pass makes both."""
    dx = torch.empty_like(call.x)
    if not dx.numel():
        return dx, torch.zeros_like(call.weight)
    target = target_of(call.x, INTERPRETED)
    launches, parts = plan_backward(call, target, inverse, dout.contiguous(), dx)
    for launch in launches:
        launch.run()
    return dx, parts.sum(0).to(call.weight.dtype)
