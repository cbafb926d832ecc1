"""RMS norm and layer norm in Triton: a tile holds whole rows, so each tensor is read once.

Rows of more than 8192 channels are computed in chunks: a kernel before goes through whole rows for
what the chunks of a row share, so the tensors are read twice (x three times where it has a mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from hierkernels.ops.rms_norm.call import NormCall
from hierkernels.refusals import GPU_DTYPES, dtype_reasons
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import cdiv, power_of_2, program_part, rounded

# Whether the kernels are interpreted is settled when this module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_ELEMENTS = 2048  # of a tile, of which a program holds up to four: 16 a thread, with 4 warps
_MAX_TILE = 8192  # channels that a tile holds
_CHUNK = 2048  # channels of a tile of longer rows
# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = ["n_rows", "tokens", "n_chunks", "n_tiles"]
# The gradients of weight and bias are summed in so many parts at most, which are added in order.
_PARTS = 512


@triton.jit
def _places(rows, c, n_rows, tokens, shift, kept, C: tl.constexpr):
    """Of a tile of rows by channels c: addresses, where they come from, whether that is there."""
    inside = (rows < n_rows)[:, None] & (c < C)[None, :]
    own = rows.to(tl.int64)[:, None] * C + c[None, :]
    delayed = (c >= kept)[None, :]
    source = own - tl.where(delayed, shift, 0).to(tl.int64) * C
    seen = inside & ((rows % tokens >= shift)[:, None] | (c < kept)[None, :])
    return own, source, inside, seen


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _inverse(squares, addend, floor):
    """1 over the length of rows; NaN stays NaN."""
    length = tl.sqrt(squares + addend)
    return 1.0 / tl.where(length < floor, floor, length)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_lengths_kernel(
    x_ptr, inverse_ptr, mean_ptr, n_rows, tokens, shift, kept, floor, addend,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """What long rows are multiplied with, and their means if CENTRED."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = tl.zeros([BLOCK_M], tl.float32)
    if CENTRED:
        sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            _own, source, _inside, seen = _places(rows, c, n_rows, tokens, shift, kept, C)
            sums += _load(x_ptr, source, seen)
        mean = tl.sum(sums, axis=1) / C
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        _own, source, _inside, seen = _places(rows, c, n_rows, tokens, shift, kept, C)
        s = _load(x_ptr, source, seen)
        if CENTRED:
            s = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
        squares += s * s
    inverse = _inverse(tl.sum(squares, axis=1), addend, floor)
    tl.store(inverse_ptr + rows, inverse, mask=rows < n_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, inverse_ptr, mean_ptr,
    n_rows, tokens, shift, kept, n_chunks, floor, addend, scale, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CENTRED: tl.constexpr, LONG: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out of BLOCK_M rows, what they are multiplied with, and their means if CENTRED.

    LONG: out of a chunk of their channels, from these.
    """
    number, chunk = program_part(n_chunks, LONG)
    rows = number * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    own, source, inside, seen = _places(rows, c, n_rows, tokens, shift, kept, C)
    s = _load(x_ptr, source, seen)
    weight = _load(weight_ptr, c, c < C)
    if CENTRED:
        if LONG:
            mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
        else:
            mean = tl.sum(s, axis=1) / C
            tl.store(mean_ptr + rows, mean, mask=is_row)
        s = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
    if LONG:
        inverse = tl.load(inverse_ptr + rows, mask=is_row, other=0.0)
    else:
        inverse = _inverse(tl.sum(s * s, axis=1), addend, floor)
        tl.store(inverse_ptr + rows, inverse, mask=is_row)
    out = s * (inverse * scale)[:, None] * weight[None, :]
    if CENTRED:
        out += _load(bias_ptr, c, c < C)[None, :]
    tl.store(out_ptr + own, rounded(out, out_ptr.dtype.element_ty, PRECISION), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_backward_sums_kernel(
    x_ptr, weight_ptr, mean_ptr, dout_ptr, sums_ptr, n_rows, tokens, shift, kept,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Of long rows the sums of s weight dout, and then those of weight dout if CENTRED."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < n_rows
    mean = tl.zeros([BLOCK_M], tl.float32)
    if CENTRED:
        mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
    along = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        own, source, inside, seen = _places(rows, c, n_rows, tokens, shift, kept, C)
        grad = _load(dout_ptr, own, inside) * _load(weight_ptr, c, c < C)[None, :]
        s = _load(x_ptr, source, seen)
        if CENTRED:
            s = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
            total += grad
        along += grad * s
    tl.store(sums_ptr + rows, tl.sum(along, axis=1), mask=is_row)
    if CENTRED:
        tl.store(sums_ptr + n_rows.to(tl.int64) + rows, tl.sum(total, axis=1), mask=is_row)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _rms_norm_backward_kernel(
    x_ptr, weight_ptr, inverse_ptr, mean_ptr, sums_ptr, dout_ptr, dx_ptr, parts_ptr,
    n_rows, tokens, shift, kept, n_chunks, floor, scale, n_tiles, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CENTRED: tl.constexpr, LONG: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of n_tiles tiles of rows, and their part of dweight, then those of dbias if CENTRED.

    LONG: of a chunk of their channels, from the sums over whole rows.
    """
    number, chunk = program_part(n_chunks, LONG)
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = _load(weight_ptr, c, c < C)
    part = tl.zeros((BLOCK_C,), tl.float32)
    bias_part = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(n_tiles):
        rows = (number * n_tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = rows < n_rows
        own, source, inside, seen = _places(rows, c, n_rows, tokens, shift, kept, C)
        s = _load(x_ptr, source, seen)
        grad = _load(dout_ptr, own, inside)
        inverse = tl.load(inverse_ptr + rows, mask=is_row, other=0.0)
        if CENTRED:
            mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
            s = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
            bias_part += tl.sum(grad, axis=0)
        factor = (inverse * scale)[:, None]
        part += tl.sum(grad * s * factor, axis=0)
        grad *= weight[None, :]
        if LONG:
            along = tl.load(sums_ptr + rows, mask=is_row, other=0.0)
        else:
            along = tl.sum(grad * s, axis=1)
        along *= inverse * inverse
        # Below the floor the length has no effect.
        along = tl.where(inverse * floor >= 1.0, 0.0, along)
        dx = (grad - s * along[:, None]) * factor
        if CENTRED:
            # s has no mean, so what of the gradient goes with it is that of its first part.
            if LONG:
                total = tl.load(sums_ptr + n_rows.to(tl.int64) + rows, mask=is_row, other=0.0)
            else:
                total = tl.sum(grad, axis=1)
            dx -= (total / C)[:, None] * factor
        tl.store(dx_ptr + source, rounded(dx, dx_ptr.dtype.element_ty, PRECISION), mask=seen)
        # What no later token reads.
        last = (rows % tokens >= tokens - shift)[:, None] & (c >= kept)[None, :]
        tl.store(dx_ptr + own, tl.zeros_like(dx).to(dx_ptr.dtype.element_ty), mask=inside & last)
    tl.store(parts_ptr + number.to(tl.int64) * C + c, part, mask=c < C)
    if CENTRED:
        second = number.to(tl.int64) + tl.num_programs(0) // n_chunks
        tl.store(parts_ptr + second * C + c, bias_part, mask=c < C)


# ---- launchers ----


def _arguments(call: NormCall) -> dict[str, Any]:
    """What all kernels take."""
    B, N, C = call.x.shape
    block_c = power_of_2(C)
    if block_c > _MAX_TILE:
        block_c = _CHUNK
    return {
        "x_ptr": call.x, "n_rows": B * N, "tokens": N, "shift": call.shift, "kept": call.kept,
        "C": C, "CENTRED": call.bias is not None, "BLOCK_C": block_c,
        "BLOCK_M": max(_ELEMENTS // block_c, 1), "num_warps": 4 if block_c <= 4096 else 8,
        "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def _chunks(arguments: dict[str, Any], target: Target) -> dict[str, Any]:
    """What the kernels with a program for each chunk take besides."""
    chunks = cdiv(arguments["C"], arguments["BLOCK_C"])
    return {"n_chunks": chunks, "LONG": chunks > 1, "PRECISION": target.precision}


def plan_forward(
    call: NormCall,
    target: Target,
    out: torch.Tensor,
    inverse: torch.Tensor,
    mean: torch.Tensor,
) -> list[Launch]:
    """The launches that fill out, inverse and, with a bias, mean; they are not empty."""
    every = _arguments(call)
    every |= {
        "inverse_ptr": inverse, "mean_ptr": mean, "floor": call.floor, "addend": call.addend,
    }  # fmt: skip
    programs = cdiv(every["n_rows"], every["BLOCK_M"])
    arguments = every | _chunks(every, target) | {
        "weight_ptr": call.weight, "bias_ptr": call.weight if call.bias is None else call.bias,
        "out_ptr": out, "scale": call.scale,
    }  # fmt: skip
    launch = Launch(_rms_norm_forward_kernel, programs * arguments["n_chunks"], arguments)
    if not arguments["LONG"]:
        return [launch]
    return [Launch(_rms_norm_lengths_kernel, programs, every), launch]


def plan_backward(
    call: NormCall,
    target: Target,
    inverse: torch.Tensor,
    mean: torch.Tensor,
    dout: torch.Tensor,
    dx: torch.Tensor,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill dx and the parts of dweight and dbias, and these (1|2, parts, C)."""
    every = _arguments(call)
    every |= {"weight_ptr": call.weight, "mean_ptr": mean, "dout_ptr": dout}
    tiles = cdiv(every["n_rows"], every["BLOCK_M"])
    each = cdiv(tiles, _PARTS)
    parts = inverse.new_empty(len(call.parameters), cdiv(tiles, each), call.x.shape[2])
    arguments = every | _chunks(every, target) | {
        "inverse_ptr": inverse, "sums_ptr": None, "dx_ptr": dx, "parts_ptr": parts,
        "floor": call.floor, "scale": call.scale, "n_tiles": each,
    }  # fmt: skip
    launch = Launch(_rms_norm_backward_kernel, parts.shape[1] * arguments["n_chunks"], arguments)
    if not arguments["LONG"]:
        return [launch], parts
    sums = inverse.new_empty(len(call.parameters), every["n_rows"])
    arguments["sums_ptr"] = sums
    return [
        Launch(_rms_norm_backward_sums_kernel, tiles, every | {"sums_ptr": sums}),
        launch,
    ], parts


# ---- the backend ----


def supports(call: NormCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("x", call.x, INTERPRETED)
    reasons += dtype_reasons(call.x.dtype, GPU_DTYPES)
    B, N, C = call.x.shape
    # The last program of the backward may count rows that are not there, a share of 1 / _PARTS.
    if max(B * N * (C // _CHUNK + 1 if C > _MAX_TILE else 1), C, call.shift) >= 2**31 - 2**23:
        reasons.append("sizes beyond 32 bits")
    return reasons


def forward(call: NormCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, inverse, mean)."""
    out, inverse, mean = call.new_outputs()
    if out.numel():
        for launch in plan_forward(call, target_of(call.x, INTERPRETED), out, inverse, mean):
            launch.run()
    return out, inverse, mean


def backward(
    call: NormCall,
    inverse: torch.Tensor,
    mean: torch.Tensor,
    dout: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, of weight and of bias; one pass over the rows makes all."""
    dx = torch.empty_like(call.x)
    if not dx.numel():
        return dx, *(torch.zeros_like(p) for p in call.parameters)
    target = target_of(call.x, INTERPRETED)
    launches, parts = plan_backward(call, target, inverse, mean, dout.contiguous(), dx)
    for launch in launches:
        launch.run()
    return dx, *parts.sum(1).to(call.weight.dtype).unbind()
