"""Keys in parts (hierkernels/key_parts.py) in Triton: a program's share, its records, their sum.

A record holds float32 numbers sum_j p_j v_j, max_j s_j and sum_j p_j of a row and a part of its
keys, p relative to that maximum. Records are added in the order of the parts, so results do not
change from run to run. The number of parts is none of compile time: it may change with each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import (
    LOWEST,
    cdiv,
    natural_lse,
    padded,
    powers,
    rounded,
    rows_stride,
)

# Numbers that vary from call to call: compiled once, not once for 1, multiples of 16 and others.
UNSPECIALIZED = ["n_parts", "n_records"]


# ---- device ----


@triton.jit
def share(begin, end, part, n_parts, TILE: tl.constexpr):
    """The part of begin, begin + TILE, ... below end: (begin, end), as many tiles as others."""
    each = tl.cdiv(tl.cdiv(end - begin, TILE), n_parts) * TILE
    first = tl.minimum(begin + part * each, end)
    return first, tl.minimum(first + each, end)


@triton.jit
def share_of_spans(spans, part, n_parts, TILE: tl.constexpr):
    """The part of the spans of key_range.key_spans."""
    begin, mid_begin, mid_end, end = spans
    begin, end = share(begin, end, part, n_parts, TILE)
    mid_begin = tl.minimum(tl.maximum(mid_begin, begin), end)
    return begin, mid_begin, tl.minimum(tl.maximum(mid_end, mid_begin), end), end


@triton.jit
def store_records(
    parts_ptr,
    rows,
    is_row,
    part,
    n_parts,
    n_records,
    acc,
    top,
    total,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Leaves the records of rows, int64 numbers (batch * heads + head) * queries + query.

    Memory: the sums (n_records, DV), then n_records maxima, then n_records totals.
    """
    d = tl.arange(0, BLOCK_DV)
    at = rows * n_parts + part
    tl.store(parts_ptr + at[:, None] * DV + d[None, :], acc, mask=is_row[:, None] & (d < DV))
    parts_ptr += n_records.to(tl.int64) * DV
    tl.store(parts_ptr + at, top, mask=is_row)
    tl.store(parts_ptr + n_records + at, total, mask=is_row)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "n_heads", "n_queries"])
def _attention_combine_kernel(
    parts_ptr,
    out_ptr,
    lse_ptr,
    stride_out,
    n_parts,
    n_records,
    n_heads,
    n_queries,
    dropout_scale,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse (natural logarithm) of a row from its records, BLOCK_M at a time."""
    row = tl.program_id(0).to(tl.int64)
    first = row * n_parts
    stats_ptr = parts_ptr + n_records.to(tl.int64) * DV
    d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    for part0 in range(0, n_parts, BLOCK_M):
        part = part0 + tl.arange(0, BLOCK_M)
        real = part < n_parts
        tops = tl.load(stats_ptr + first + part, mask=real, other=LOWEST)
        totals = tl.load(stats_ptr + n_records + first + part, mask=real, other=0.0)
        at = (first + part)[:, None] * DV + d[None, :]
        sums = tl.load(parts_ptr + at, mask=real[:, None] & (d < DV)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        weight = powers(tops, new_top, 1.0, NATURAL, PRECISION)
        shrink = powers(top, new_top, 1.0, NATURAL, PRECISION)
        total = total * shrink + tl.sum(totals * weight, 0)
        acc = acc * shrink + tl.sum(sums * weight[:, None], 0)
        top = new_top
    out = acc * (dropout_scale / tl.where(total == 0.0, 1.0, total))
    h, i = row // n_queries % n_heads, row % n_queries
    out_ptr += row // n_queries // n_heads * stride_out[0] + h * stride_out[1] + i * stride_out[2]
    tl.store(out_ptr + d, rounded(out, out_ptr.dtype.element_ty, PRECISION), mask=d < DV)
    tl.store(lse_ptr + row, natural_lse(top, total, NATURAL, PRECISION))


# ---- host ----


@dataclass(frozen=True)
class Records:
    """Memory for the records of a call's rows."""

    parts: int
    n_records: int
    memory: torch.Tensor | None  # None: the keys are in one part, which writes out and lse itself

    @staticmethod
    def new(lse: torch.Tensor, parts: int, channels: int) -> Records:
        """For the rows of lse; channels: of the values."""
        n = lse.numel() * parts
        memory = None if parts == 1 else lse.new_empty(n * (channels + 2))
        return Records(parts, n, memory)

    def arguments(self) -> dict[str, Any]:
        """Of the kernel that leaves records."""
        return {
            "parts_ptr": self.memory, "n_parts": self.parts, "n_records": self.n_records,
            "PARTS": self.memory is not None,
        }  # fmt: skip

    def combine(
        self, target: Target, out: torch.Tensor, lse: torch.Tensor, natural: bool, scale: float
    ) -> list[Launch]:
        """The launch that fills out = scale * sum / total, and lse; none for one part."""
        if self.memory is None:
            return []
        DV = out.shape[3]
        block_dv = padded(DV)
        arguments = self.arguments()
        del arguments["PARTS"]
        return [Launch(_attention_combine_kernel, lse.numel(), {
            **arguments, "out_ptr": out, "lse_ptr": lse, "stride_out": rows_stride(out),
            "n_heads": out.shape[1], "n_queries": out.shape[2], "dropout_scale": scale, "DV": DV,
            "BLOCK_DV": block_dv, "BLOCK_M": min(cdiv(2048, block_dv), 32), "NATURAL": natural,
            "PRECISION": target.precision, "num_warps": 4, "num_stages": 1,
            "enable_fp_fusion": True,
        })]  # fmt: skip
