"""hk.rotary: checks the arguments, puts them in canonical form and calls the operator."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.ops.attention.call import unit_stride
from hierkernels.ops.rotary import reference, schema
from hierkernels.ops.rotary.call import RotaryCall

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make_call(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> RotaryCall:
    """Checks the arguments of hk.rotary and returns them in canonical form."""
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {t.device}")
    if x.ndim != 4:
        raise ValueError(
            f"x must have 4 dimensions (batch, heads, tokens, channels), got {tuple(x.shape)}"
        )
    N, D = x.shape[2:]
    if D % 2 or D == 0:
        raise ValueError(f"x must have an even number of channels, 2 or more, got {D}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape != (N, D // 2):
            raise ValueError(
                f"{name} must have shape (tokens, channels / 2) = {(N, D // 2)}, got "
                f"{tuple(t.shape)}"
            )
        if t.requires_grad:
            raise ValueError(f"{name} must not require a gradient: tables are constants")
    return RotaryCall(unit_stride(x), cos.to(wide).contiguous(), sin.to(wide).contiguous(), False)


def run(call: RotaryCall, backend: str | None) -> torch.Tensor:
    """out of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend, dispatch.NO_KERNELS["rotary"])
    return reference.forward(call) if name == "reference" else schema.rotary(call, name)


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Rotary positions: channels c and c + D/2, (a, b), become (a cos - b sin, b cos + a sin).

    Args:
        x: (B, H, N, D), D even, any strides: float32, bfloat16, float16 or float64.
        cos, sin: (N, D / 2), tables of the tokens' positions; constants, in any floating-point
            dtype. Factors such as those of xpos may be multiplied into both.
        backend: "triton", "cpu" or "reference"; None = the fastest supported.

    Returns:
        (B, H, N, D) in the dtype of x, rounded once, computed in float32 (float64 for float64); x's
        order of memory. Differentiable any number of times in x. Where CUDA C++ is
        forced for all operators the choice is free, as it has no such kernel.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or a table
            requires a gradient.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to:
        a, b = x.chunk(2, dim=-1)
        torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021),
        section 3.4.2, with the two halves of the channels in place of neighbours.
    """
    return run(make_call(x, cos, sin), backend)


def problem(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **options: Any) -> RotaryCall:
    """The canonical form of a call, as hk.rotary makes it."""
    return make_call(x, cos, sin, **options)
