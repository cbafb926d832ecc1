"""The gated sum of the branches in Triton: each tensor is read or written once.

Rows of a tile are (token, head) pairs of one sequence, in the order of memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hierkernels.ops.attention.call import unit_stride
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import (
    cdiv,
    load_rows,
    padded,
    power_of_2,
    rounded,
    row_offsets,
    rows_stride,
    store_rows,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether the kernels are interpreted is settled when this module is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Elements of a tile, of which a program holds up to five: 16 a thread, with 4 warps.
_ELEMENTS = 2048
# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = ["n_rows", "n_tiles"]


@triton.jit
def _load(
    ptr, batch, rows, n_rows, stride, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A tile of a sequence in float32, [BLOCK_M, BLOCK_D]."""
    ptr += batch * stride[0]
    return load_rows(ptr, rows, n_rows, stride, HEADS, D, BLOCK_D, True).to(tl.float32)


@triton.jit
def _load_gate(ptr, batch, rows, n_rows, stride, index: tl.constexpr, HEADS: tl.constexpr):
    """One gate of each row in float32, [BLOCK_M, 1]."""
    ptrs = ptr + batch * stride[0] + index * stride[3] + row_offsets(rows, stride, HEADS)
    return tl.load(ptrs, mask=rows < n_rows, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _native_sparse_attention_sum_forward_kernel(
    gates_ptr, first_ptr, second_ptr, third_ptr, out_ptr,
    stride_gates, stride_first, stride_second, stride_third, stride_out,
    n_rows, n_tiles,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = sum of gate times branch."""
    batch = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    total = _load(first_ptr, batch, rows, n_rows, stride_first, HEADS, D, BLOCK_D)
    total *= _load_gate(gates_ptr, batch, rows, n_rows, stride_gates, 0, HEADS)
    part = _load(second_ptr, batch, rows, n_rows, stride_second, HEADS, D, BLOCK_D)
    total += part * _load_gate(gates_ptr, batch, rows, n_rows, stride_gates, 1, HEADS)
    part = _load(third_ptr, batch, rows, n_rows, stride_third, HEADS, D, BLOCK_D)
    total += part * _load_gate(gates_ptr, batch, rows, n_rows, stride_gates, 2, HEADS)
    out_ptr += batch * stride_out[0]
    store_rows(out_ptr, rows, n_rows, stride_out, total, HEADS, D, BLOCK_D, PRECISION)


@triton.jit
def _differentiate_part(
    gates_ptr, part_ptr, dgates_ptr, dpart_ptr, grad, batch, rows, n_rows,
    stride_gates, stride_part, stride_dgates, stride_dpart,
    index: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One branch: dpart = gate * grad, dgate = sum over channels of grad * part."""
    gate = _load_gate(gates_ptr, batch, rows, n_rows, stride_gates, index, HEADS)
    dpart_ptr += batch * stride_dpart[0]
    store_rows(dpart_ptr, rows, n_rows, stride_dpart, grad * gate, HEADS, D, BLOCK_D, PRECISION)
    part = _load(part_ptr, batch, rows, n_rows, stride_part, HEADS, D, BLOCK_D)
    dgate = tl.sum(grad * part, axis=1)
    ptrs = dgates_ptr + batch * stride_dgates[0] + index * stride_dgates[3]
    ptrs += row_offsets(rows, stride_dgates, HEADS)
    tl.store(ptrs, rounded(dgate, dgates_ptr.dtype.element_ty, PRECISION), mask=rows < n_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _native_sparse_attention_sum_backward_kernel(
    gates_ptr, first_ptr, second_ptr, third_ptr, grad_ptr,
    dgates_ptr, dfirst_ptr, dsecond_ptr, dthird_ptr,
    stride_gates, stride_first, stride_second, stride_third, stride_grad,
    stride_dgates, stride_dfirst, stride_dsecond, stride_dthird,
    n_rows, n_tiles,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates and of the branches."""
    batch = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    grad = _load(grad_ptr, batch, rows, n_rows, stride_grad, HEADS, D, BLOCK_D)
    _differentiate_part(
        gates_ptr, first_ptr, dgates_ptr, dfirst_ptr, grad, batch, rows, n_rows,
        stride_gates, stride_first, stride_dgates, stride_dfirst, 0, HEADS, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    _differentiate_part(
        gates_ptr, second_ptr, dgates_ptr, dsecond_ptr, grad, batch, rows, n_rows,
        stride_gates, stride_second, stride_dgates, stride_dsecond, 1, HEADS, D, BLOCK_D,
        PRECISION,
    )  # fmt: skip
    _differentiate_part(
        gates_ptr, third_ptr, dgates_ptr, dthird_ptr, grad, batch, rows, n_rows,
        stride_gates, stride_third, stride_dgates, stride_dthird, 2, HEADS, D, BLOCK_D, PRECISION,
    )  # fmt: skip


# ---- launchers ----


def _arguments(out: torch.Tensor, target: Target) -> tuple[int, dict[str, Any]]:
    """(programs, what both kernels take)."""
    B, H, N, D = out.shape
    block_d = padded(D)
    block_m = min(max(_ELEMENTS // block_d, 1), power_of_2(N * H))
    tiles = cdiv(N * H, block_m)
    return B * tiles, {
        "n_rows": N * H, "n_tiles": tiles, "HEADS": H, "D": D, "BLOCK_D": block_d,
        "BLOCK_M": block_m, "PRECISION": target.precision, "num_warps": 4, "num_stages": 1,
        "enable_fp_fusion": True,
    }  # fmt: skip


def _tensors(gates: torch.Tensor, dgates: str, names: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Pointers and strides of tensors by name; gates have a fourth stride."""
    found: dict[str, Any] = {}
    for name, t in names.items():
        found[f"{name}_ptr"] = t
        is_gates = name in ("gates", dgates)
        found[f"stride_{name}"] = t.stride() if is_gates else rows_stride(t)
    return found


_PARTS = ("first", "second", "third")


def plan_forward(
    gates: torch.Tensor, parts: tuple[torch.Tensor, ...], out: torch.Tensor, target: Target
) -> Launch:
    """The launch that fills out; it is not empty."""
    programs, arguments = _arguments(out, target)
    named = {"gates": gates, **dict(zip(_PARTS, parts, strict=True)), "out": out}
    arguments |= _tensors(gates, "", named)
    return Launch(_native_sparse_attention_sum_forward_kernel, programs, arguments)


def plan_backward(
    gates: torch.Tensor,
    parts: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
    dgates: torch.Tensor,
    dparts: tuple[torch.Tensor, ...],
    target: Target,
) -> Launch:
    """The launch that fills dgates and dparts; they are not empty."""
    programs, arguments = _arguments(grad, target)
    named = {"gates": gates, **dict(zip(_PARTS, parts, strict=True)), "grad": grad}
    named |= {"dgates": dgates}
    named |= {f"d{name}": t for name, t in zip(_PARTS, dparts, strict=True)}
    arguments |= _tensors(gates, "dgates", named)
    return Launch(_native_sparse_attention_sum_backward_kernel, programs, arguments)


def reasons(part: torch.Tensor) -> list[str]:
    """Why the kernels cannot compute the sum of such branches (B, H, N, D); empty if they can."""
    found = device_reasons("the branches", part, INTERPRETED)
    if part.dtype not in DTYPES:
        found.append(f"dtype {part.dtype} is not one of float32, bfloat16, float16")
    B, H, N, _ = part.shape
    if B * H * N >= 2**31 - 2**16:
        found.append("sizes beyond 32 bits")
    return found


def forward(gates: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """out (B, H, N, D)."""
    parts = tuple(map(unit_stride, parts))
    out = torch.empty_like(parts[0])
    if out.numel():
        plan_forward(gates, parts, out, target_of(out, INTERPRETED)).run()
    return out


def backward(
    gates: torch.Tensor, parts: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(dgates, dfirst, dsecond, dthird)."""
    parts, grad = tuple(map(unit_stride, parts)), unit_stride(grad)
    dgates, dparts = torch.empty_like(gates), tuple(map(torch.empty_like, parts))
    if grad.numel():
        target = target_of(grad, INTERPRETED)
        plan_backward(gates, parts, grad, dgates, dparts, target).run()
    return dgates, *dparts
