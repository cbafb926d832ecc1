"""Rotary positions in Triton: rows of a tile are (token, head) pairs of one sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hierkernels.ops.rotary.call import RotaryCall
from hierkernels.refusals import GPU_DTYPES, dtype_reasons
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import cdiv, power_of_2, rounded

# Whether the kernels are interpreted is settled when this module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_ELEMENTS = 2048  # of a tile, of which a program holds six: 16 a thread, with 4 warps


@triton.jit(do_not_specialize=["n_rows", "n_tiles", "heads"])
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, stride_x, stride_out, n_rows, n_tiles, heads, sign,
    HALF: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one sequence; sign: 1, or -1 to turn back."""
    batch = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = (rows // heads).to(tl.int64), (rows % heads).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = (rows < n_rows)[:, None] & (c < HALF)[None, :]  # [BLOCK_M, BLOCK_C]
    table = token[:, None] * HALF + c[None, :]
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0) * sign
    x = x_ptr + batch * stride_x[0] + (head * stride_x[1] + token * stride_x[2])[:, None] + c
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + batch * stride_out[0]
    out += (head * stride_out[1] + token * stride_out[2])[:, None] + c
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out, rounded(first * cos - second * sin, dtype, PRECISION), mask=inside)
    tl.store(out + HALF, rounded(second * cos + first * sin, dtype, PRECISION), mask=inside)


def plan(call: RotaryCall, target: Target, out: torch.Tensor) -> Launch:
    """The launch that fills out; it is not empty."""
    B, H, N, D = call.x.shape
    block_c = power_of_2(D // 2)
    block_m = min(max(_ELEMENTS // block_c, 1), power_of_2(N * H))
    tiles = cdiv(N * H, block_m)
    arguments = {
        "x_ptr": call.x, "cos_ptr": call.cos, "sin_ptr": call.sin, "out_ptr": out,
        "stride_x": call.x.stride()[:3], "stride_out": out.stride()[:3], "n_rows": N * H,
        "n_tiles": tiles, "heads": H, "sign": -1.0 if call.transposed else 1.0, "HALF": D // 2,
        "BLOCK_C": block_c, "BLOCK_M": block_m, "PRECISION": target.precision, "num_warps": 4,
        "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_rotary_kernel, B * tiles, arguments)


def supports(call: RotaryCall) -> list[str]:
    """Why the Triton kernel cannot compute this call; empty if it can."""
    reasons = device_reasons("x", call.x, INTERPRETED)
    reasons += dtype_reasons(call.x.dtype, GPU_DTYPES)
    if max(call.x.shape[1] * call.x.shape[2], call.x.numel() // 2) >= 2**31:
        reasons.append("sizes beyond 32 bits")
    return reasons


def forward(call: RotaryCall) -> torch.Tensor:
    """out."""
    out = call.new_output()
    if out.numel():
        plan(call, target_of(call.x, INTERPRETED), out).run()
    return out
