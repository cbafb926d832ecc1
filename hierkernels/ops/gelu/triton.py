"""GELU in Triton: tiles of a result's elements, each read and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hierkernels.ops.gelu.call import GeluCall
from hierkernels.refusals import GPU_DTYPES, dtype_reasons
from hierkernels.triton_common.activation import activate, slope
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import cdiv, rounded

# Whether the kernels are interpreted is settled when this module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_BLOCK = 1024  # elements of a result, 8 a thread


@triton.jit
def _places(total, C, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Of BLOCK elements of a result with C channels: their own places and those in x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = at
    if SPLIT:  # x has twice the channels
        source += at // C * C
    # A multiple of C, as the compiler is to know: it masks, and so loads, 16 bytes at once.
    return at, source, at < total // C * C


@triton.jit(do_not_specialize=["total"])
def _gelu_forward_kernel(
    x_ptr, first_ptr, second_ptr, total, C, FORM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of first, and of second with halves."""
    at, source, inside = _places(total, C, FORM != "plain", BLOCK)
    dtype: tl.constexpr = first_ptr.dtype.element_ty
    y = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if FORM != "gated":
        y = activate(y, "gelu")
    if FORM != "plain":
        right = tl.load(x_ptr + source + C, mask=inside, other=0.0).to(tl.float32)
        right = activate(right, "gelu")
        if FORM == "gated":
            y *= right
        else:
            tl.store(second_ptr + at, rounded(right, dtype, PRECISION), mask=inside)
    tl.store(first_ptr + at, rounded(y, dtype, PRECISION), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _gelu_backward_kernel(
    x_ptr, first_ptr, second_ptr, dx_ptr, total, C, FORM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, of BLOCK elements of the gradients of first and second."""
    at, source, inside = _places(total, C, FORM != "plain", BLOCK)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if FORM == "gated":
        b = tl.load(x_ptr + source + C, mask=inside, other=0.0).to(tl.float32)
        dx = grad * activate(b, "gelu")
        right = grad * x * slope(b, "gelu")
        tl.store(dx_ptr + source + C, rounded(right, dtype, PRECISION), mask=inside)
    else:
        dx = grad * slope(x, "gelu")
    if FORM == "halves":
        b = tl.load(x_ptr + source + C, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope(b, "gelu")
        tl.store(dx_ptr + source + C, rounded(right, dtype, PRECISION), mask=inside)
    tl.store(dx_ptr + source, rounded(dx, dtype, PRECISION), mask=inside)


# ---- launchers ----


def _launch(kernel: Any, call: GeluCall, target: Target, **tensors: torch.Tensor) -> Launch:
    total = call.x.numel() // (1 if call.form == "plain" else 2)
    arguments = {f"{name}_ptr": t for name, t in tensors.items()} | {
        "x_ptr": call.x, "total": total, "C": call.channels, "FORM": call.form, "BLOCK": _BLOCK,
        "PRECISION": target.precision, "num_warps": 4, "num_stages": 1,
        "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(kernel, cdiv(total, _BLOCK), arguments)


def plan_forward(
    call: GeluCall, target: Target, first: torch.Tensor, second: torch.Tensor
) -> Launch:
    """The launch that fills first, which is not empty, and second with halves."""
    return _launch(_gelu_forward_kernel, call, target, first=first, second=second)


def plan_backward(
    call: GeluCall, target: Target, first: torch.Tensor, second: torch.Tensor, dx: torch.Tensor
) -> Launch:
    """The launch that fills dx from the gradients of first and second."""
    return _launch(_gelu_backward_kernel, call, target, first=first, second=second, dx=dx)


# ---- the backend ----


def supports(call: GeluCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("x", call.x, INTERPRETED)
    reasons += dtype_reasons(call.x.dtype, GPU_DTYPES)
    return reasons


def forward(call: GeluCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second)."""
    first, second = call.new_outputs()
    if first.numel():
        plan_forward(call, target_of(call.x, INTERPRETED), first, second).run()
    return first, second


def backward(call: GeluCall, dfirst: torch.Tensor, dsecond: torch.Tensor) -> torch.Tensor:
    """The gradient of x."""
    dx = torch.empty_like(call.x)
    if dx.numel():
        target = target_of(call.x, INTERPRETED)
        plan_backward(call, target, dfirst.contiguous(), dsecond.contiguous(), dx).run()
    return dx
