"""Plans the launches of one causal_sgu call: which kernels, on which tiles.

A plan only looks at shapes, strides and dtypes: triton.py runs it, aot.py compiles it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hierkernels.ops.causal_sgu.call import SguCall
from hierkernels.ops.causal_sgu.triton_kernels import (
    _causal_sgu_backward_gate_kernel,
    _causal_sgu_backward_mix_kernel,
    _causal_sgu_backward_weight_kernel,
    _causal_sgu_forward_kernel,
)
from hierkernels.triton_common.configs import Config, choose
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import cdiv, power_of_2

# Programs that keep a large device busy; fixed, so that results do not depend on the device.
_BUSY = 512


# Rows (block_m), columns and terms (block_k) of a tile, by kernel, for 16-bit products and for
# those of float32 by fused multiply-adds.
_HALF = {
    "forward": Config(128, 128, 8, 3, block_k=32),
    "gate": Config(128, 128, 8, 3, block_k=32),
    "weight": Config(128, 128, 8, 3, block_k=32),
}
_SINGLE = {
    "forward": Config(64, 64, 4, 2, block_k=16),
    "gate": Config(64, 64, 8, 2, block_k=16),  # 4 warps spill 4 bytes on sm_90
    "weight": Config(64, 32, 4, 2, block_k=16),
}
# The interpreter takes as long for a small tile as for a large one: few, but of every kind.
_INTERPRETER = {
    "forward": Config(32, 16, 4, 1, block_k=16),
    "gate": Config(32, 16, 4, 1, block_k=16),
    "weight": Config(32, 16, 4, 1, block_k=16),
}


_KERNELS = {
    "forward": "causal_sgu_forward",
    "gate": "causal_sgu_backward_gate",
    "weight": "causal_sgu_backward_weight",
}


def _tiles(kernel: str, target: Target, element_size: int, rows: int, channels: int) -> Config:
    """The configuration, its tile no larger than the problem."""
    if target.family == "interpreter":
        return _INTERPRETER[kernel]
    t = (_SINGLE if element_size == 4 else _HALF)[kernel]
    odd = kernel == "forward" and bool(channels % 16)  # its addresses take more registers
    most_m = max(16, power_of_2(rows))
    most_n = max(16, power_of_2(channels if kernel != "weight" else rows))
    m, n = min(64 if odd else t.block_m, most_m), min(t.block_n, most_n)
    warps = t.num_warps if 2 * m * n >= t.block_m * t.block_n else 4
    t = replace(t, block_m=m, block_n=n, num_warps=warps)
    bucket = f"{8 * element_size}-bit rows{min(most_m, 128)} columns{min(most_n, 128)}"
    t = choose(target, _KERNELS[kernel], bucket + (" odd" if odd else ""), t)
    return replace(t, block_m=min(t.block_m, most_m), block_n=min(t.block_n, most_n))


def _strides(t: torch.Tensor | None) -> tuple[int, ...]:
    """All strides but the last, which is 1."""
    return (0, 0) if t is None else tuple(t.stride()[:2])


class Shape:
    """Sizes that the kernels take, derived from a call."""

    def __init__(self, call: SguCall) -> None:
        self.batch, self.tokens, channels = call.gate.shape
        self.dim = channels // call.heads
        self.look_back = 0 < call.window < self.tokens
        self.size = call.window if self.look_back else self.tokens
        self.buckets = cdiv(self.tokens, self.size)

    def arguments(self, call: SguCall, target: Target) -> dict[str, Any]:
        """The arguments that the kernels with the weight take."""
        return {
            "batch": self.batch, "n_tokens": self.tokens, "size": self.size,
            "n_buckets": self.buckets, "dim": self.dim, "own": call.window,
            "LOOK_BACK": self.look_back, "PRECISION": target.precision,
        }  # fmt: skip

    def programs(self, call: SguCall, tiles: Config) -> int:
        """Tiles of rows and channels."""
        of_head = self.batch * self.buckets * cdiv(self.size, tiles.block_m)
        return call.heads * of_head * cdiv(self.dim, tiles.block_n)


def plan_forward(
    call: SguCall, target: Target, out: torch.Tensor, z: torch.Tensor | None
) -> list[Launch]:
    """out, and the pre-activation if z is given."""
    shape = Shape(call)
    tiles = _tiles("forward", target, call.gate.element_size(), shape.size, shape.dim)
    arguments = shape.arguments(call, target) | {
        "residual_ptr": call.residual, "gate_ptr": call.gate, "weight_ptr": call.weight,
        "bias_ptr": call.bias, "gate_residual_ptr": call.gate_residual, "out_ptr": out, "z_ptr": z,
        "stride_residual": _strides(call.residual), "stride_gate": _strides(call.gate),
        "stride_weight": _strides(call.weight), "stride_bias": call.bias.stride(),
        "stride_gate_residual": _strides(call.gate_residual), "stride_out": _strides(out),
        "ACTIVATION": call.activation, "BLOCK_M": tiles.block_m, "BLOCK_C": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        **tiles.compiler_options(),
    }  # fmt: skip
    return [Launch(_causal_sgu_forward_kernel, shape.programs(call, tiles), arguments)]


def plan_mix(
    call: SguCall,
    target: Target,
    z: torch.Tensor,
    dout: torch.Tensor,
    dresidual: torch.Tensor | None,
    dmix: torch.Tensor,
    sums: torch.Tensor | None,
) -> list[Launch]:
    """dresidual and dmix (contiguous), and the sums of dmix (B, N, H)."""
    shape = Shape(call)
    block_m, block_c = 16, min(64, max(16, power_of_2(shape.dim)))
    arguments = {
        "residual_ptr": call.residual, "z_ptr": z, "dout_ptr": dout, "dresidual_ptr": dresidual,
        "dmix_ptr": dmix, "sums_ptr": sums, "stride_residual": _strides(call.residual),
        "stride_z": _strides(z), "stride_dout": _strides(dout), "stride_dmix": _strides(dmix),
        "n_tokens": shape.tokens, "heads": call.heads, "dim": shape.dim,
        "ACTIVATION": call.activation, "BLOCK_M": block_m, "BLOCK_C": block_c,
        "PRECISION": target.precision, **Config(block_m, block_c, 4, 1).compiler_options(),
    }  # fmt: skip
    programs = shape.batch * cdiv(shape.tokens, block_m) * call.heads
    return [Launch(_causal_sgu_backward_mix_kernel, programs, arguments)]


def plan_gate(
    call: SguCall, target: Target, dmix: torch.Tensor, dgate: torch.Tensor
) -> list[Launch]:
    """The gate's gradient."""
    shape = Shape(call)
    tiles = _tiles("gate", target, call.gate.element_size(), shape.size, shape.dim)
    arguments = shape.arguments(call, target) | {
        "weight_ptr": call.weight, "dmix_ptr": dmix, "dgate_ptr": dgate,
        "stride_weight": _strides(call.weight), "stride_dmix": _strides(dmix),
        "stride_dgate": _strides(dgate), "BLOCK_M": tiles.block_m, "BLOCK_C": tiles.block_n,
        "BLOCK_K": tiles.block_k, **tiles.compiler_options(),
    }  # fmt: skip
    return [Launch(_causal_sgu_backward_gate_kernel, shape.programs(call, tiles), arguments)]


def plan_weight(
    call: SguCall, target: Target, dmix: torch.Tensor
) -> tuple[list[Launch], torch.Tensor]:
    """The weight's gradient in splits (splits, H, ...), which are to be added.

    Float32 if there are several, else in the dtype of the weight.
    """
    shape = Shape(call)
    H, rows, columns = call.weight.shape
    tiles = _tiles("weight", target, call.gate.element_size(), shape.size, shape.dim)
    halves = 2 if call.window else 1
    programs = H * cdiv(rows, tiles.block_m) * cdiv(rows, tiles.block_n) * halves
    items = shape.batch * shape.buckets
    of_split = cdiv(items, max(1, min(items, _BUSY // programs)))
    splits = cdiv(items, of_split)
    dtype = call.weight.dtype if splits == 1 else torch.float32
    partial = call.weight.new_empty((splits, H, rows, columns), dtype=dtype)
    arguments = shape.arguments(call, target) | {
        "gate_ptr": call.gate, "dmix_ptr": dmix, "dweight_ptr": partial,
        "stride_gate": _strides(call.gate), "stride_dmix": _strides(dmix),
        "stride_dweight": partial.stride()[:3], "heads": H, "width": rows,
        "items_of_split": of_split, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_C": tiles.block_k,
        **tiles.compiler_options(),
    }  # fmt: skip
    return [Launch(_causal_sgu_backward_weight_kernel, programs * splits, arguments)], partial
