"""Registers torch.ops.hierkernels.rotary, its fake and its gradient, which is itself transposed."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import direct_apply, is_unwatched
from hierkernels.library import LIBRARY, compute_one_by_one, differentiable, register_autograd
from hierkernels.ops.attention.call import unit_stride
from hierkernels.ops.rotary.call import RotaryCall

LIBRARY.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool transposed, str backend) -> Tensor"
)  # fmt: skip


def _forward(*args: Any) -> torch.Tensor:
    call = RotaryCall(*args[:4])
    return dispatch.module_for("rotary", call, args[4]).forward(call)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, cos, sin, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, dout: torch.Tensor) -> tuple:
    cos, sin = ctx.saved_tensors
    call = RotaryCall(unit_stride(dout), cos, sin, not ctx.transposed)
    return rotary(call, ctx.backend), None, None, None, None


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("rotary", _forward, _key)
torch.library.register_fake(
    "hierkernels::rotary", lambda *args: RotaryCall(*args[:4]).new_output(), lib=LIBRARY
)
register_autograd("rotary", "rotary", _differentiate, _setup_context)


compute_one_by_one("rotary")
_watched = differentiable(
    "rotary", torch.ops.hierkernels.rotary.default, _setup_context, _differentiate
)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        # A setup_context of its own would make PyTorch inspect the signature at every call.
        out = _forward(*args)
        _setup_context(ctx, args, out)
        return out

    backward = staticmethod(_differentiate)


_eager = direct_apply(_Eager)


def rotary(call: RotaryCall, backend: str) -> torch.Tensor:
    """out: the operator, or its implementation where nobody sees the difference."""
    run: Any = _watched
    if is_unwatched((call.x, call.cos, call.sin)):
        run = _eager if torch.is_grad_enabled() and call.x.requires_grad else _forward
    return run(call.x, call.cos, call.sin, call.transposed, backend)
