"""RMS norm and layer norm in Triton: a tile holds whole rows, so each tensor is read once."""

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
from hierkernels.triton_common.tiles import cdiv, power_of_2, rounded

# Whether the kernels are interpreted is settled when this module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_ELEMENTS = 2048  # of a tile, of which a program holds up to four: 16 a thread, with 4 warps
_MAX_CHANNELS = 8192
# The gradients of weight and bias are summed in so many parts at most, which are added in order.
_PARTS = 512


@triton.jit
def _places(
    rows, n_rows, tokens, shift, kept, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of a tile [BLOCK_M, BLOCK_C]: its addresses, where they come from, whether that is there."""
    c = tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (c < C)[None, :]
    own = rows.to(tl.int64)[:, None] * C + c[None, :]
    delayed = (c >= kept)[None, :]
    source = own - tl.where(delayed, shift, 0).to(tl.int64) * C
    seen = inside & ((rows % tokens >= shift)[:, None] | (c < kept)[None, :])
    return own, source, inside, seen


@triton.jit(do_not_specialize=["n_rows", "tokens"])
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, inverse_ptr, mean_ptr,
    n_rows, tokens, shift, kept, floor, addend, scale, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out of BLOCK_M rows, what they are multiplied with, and their means if CENTRED."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own, source, inside, seen = _places(rows, n_rows, tokens, shift, kept, C, BLOCK_M, BLOCK_C)
    s = tl.load(x_ptr + source, mask=seen, other=0.0).to(tl.float32)
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(s, axis=1) / C
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
        s = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
    length = tl.sqrt(tl.sum(s * s, axis=1) + addend)
    # NaN stays NaN.
    inverse = 1.0 / tl.where(length < floor, floor, length)
    tl.store(inverse_ptr + rows, inverse, mask=rows < n_rows)
    out = s * (inverse * scale)[:, None] * weight[None, :]
    if CENTRED:
        out += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + own, rounded(out, out_ptr.dtype.element_ty, PRECISION), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "tokens", "n_tiles"])
def _rms_norm_backward_kernel(
    x_ptr, weight_ptr, inverse_ptr, mean_ptr, dout_ptr, dx_ptr, parts_ptr,
    n_rows, tokens, shift, kept, floor, scale, n_tiles, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of n_tiles tiles of rows, and their part of dweight, then those of dbias if CENTRED."""
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK_C,), tl.float32)
    bias_part = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(n_tiles):
        rows = (tl.program_id(0) * n_tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        own, source, inside, seen = _places(rows, n_rows, tokens, shift, kept, C, BLOCK_M, BLOCK_C)
        s = tl.load(x_ptr + source, mask=seen, other=0.0).to(tl.float32)
        grad = tl.load(dout_ptr + own, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + rows, mask=rows < n_rows, other=0.0)
        if CENTRED:
            mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
            s = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
            bias_part += tl.sum(grad, axis=0)
        factor = (inverse * scale)[:, None]
        part += tl.sum(grad * s * factor, axis=0)
        grad *= weight[None, :]
        along = tl.sum(grad * s, axis=1) * inverse * inverse
        # Below the floor the length has no effect.
        along = tl.where(inverse * floor >= 1.0, 0.0, along)
        dx = (grad - s * along[:, None]) * factor
        if CENTRED:
            # s has no mean, so what of the gradient goes with it is that of its first part.
            dx -= (tl.sum(grad, axis=1) / C)[:, None] * factor
        tl.store(dx_ptr + source, rounded(dx, dx_ptr.dtype.element_ty, PRECISION), mask=seen)
        # What no later token reads.
        last = (rows % tokens >= tokens - shift)[:, None] & (c >= kept)[None, :]
        tl.store(dx_ptr + own, tl.zeros_like(dx).to(dx_ptr.dtype.element_ty), mask=inside & last)
    program = tl.program_id(0).to(tl.int64)
    tl.store(parts_ptr + program * C + c, part, mask=c < C)
    if CENTRED:
        program += tl.num_programs(0)
        tl.store(parts_ptr + program * C + c, bias_part, mask=c < C)


# ---- launchers ----


def _arguments(
    call: NormCall, target: Target, inverse: torch.Tensor, mean: torch.Tensor
) -> dict[str, Any]:
    """What both kernels take."""
    B, N, C = call.x.shape
    block_c = power_of_2(C)
    return {
        "x_ptr": call.x, "weight_ptr": call.weight, "n_rows": B * N, "tokens": N,
        "shift": call.shift, "kept": call.kept, "floor": call.floor, "scale": call.scale, "C": C,
        "inverse_ptr": inverse, "mean_ptr": mean, "CENTRED": call.bias is not None,
        "BLOCK_C": block_c, "BLOCK_M": max(_ELEMENTS // block_c, 1),
        "PRECISION": target.precision, "num_warps": 4 if block_c <= 4096 else 8, "num_stages": 1,
        "enable_fp_fusion": True,
    }  # fmt: skip


def plan_forward(
    call: NormCall,
    target: Target,
    out: torch.Tensor,
    inverse: torch.Tensor,
    mean: torch.Tensor,
) -> Launch:
    """The launch that fills out, inverse and, with a bias, mean; they are not empty."""
    arguments = _arguments(call, target, inverse, mean) | {"out_ptr": out, "addend": call.addend}
    arguments["bias_ptr"] = call.weight if call.bias is None else call.bias
    programs = cdiv(arguments["n_rows"], arguments["BLOCK_M"])
    return Launch(_rms_norm_forward_kernel, programs, arguments)


def plan_backward(
    call: NormCall,
    target: Target,
    inverse: torch.Tensor,
    mean: torch.Tensor,
    dout: torch.Tensor,
    dx: torch.Tensor,
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills dx and the parts of dweight and dbias, and these (1 or 2, parts, C)."""
    arguments = _arguments(call, target, inverse, mean)
    tiles = cdiv(arguments["n_rows"], arguments["BLOCK_M"])
    each = cdiv(tiles, _PARTS)
    programs = cdiv(tiles, each)
    parts = inverse.new_empty(len(call.parameters), programs, call.x.shape[2])
    arguments |= {"dout_ptr": dout, "dx_ptr": dx, "parts_ptr": parts, "n_tiles": each}
    return Launch(_rms_norm_backward_kernel, programs, arguments), parts


# ---- the backend ----


def supports(call: NormCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("x", call.x, INTERPRETED)
    reasons += dtype_reasons(call.x.dtype, GPU_DTYPES)
    if call.x.shape[2] > _MAX_CHANNELS:
        reasons.append(f"{call.x.shape[2]} channels, at most {_MAX_CHANNELS} fit a tile")
    # The last program of the backward may count rows that are not there, a share of 1 / _PARTS.
    if max(call.x.shape[0] * call.x.shape[1], call.shift) >= 2**31 - 2**23:
        reasons.append("sizes beyond 32 bits")
    return reasons


def forward(call: NormCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, inverse, mean)."""
    out, inverse, mean = call.new_outputs()
    if out.numel():
        plan_forward(call, target_of(call.x, INTERPRETED), out, inverse, mean).run()
    return out, inverse, mean


def backward(
    call: NormCall,
    inverse: torch.Tensor,
    mean: torch.Tensor,
    dout: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, of weight and of bias; one pass makes all."""
    dx = torch.empty_like(call.x)
    if not dx.numel():
        return dx, *(torch.zeros_like(p) for p in call.parameters)
    target = target_of(call.x, INTERPRETED)
    launch, parts = plan_backward(call, target, inverse, mean, dout.contiguous(), dx)
    launch.run()
    return dx, *parts.sum(1).to(call.weight.dtype).unbind()
