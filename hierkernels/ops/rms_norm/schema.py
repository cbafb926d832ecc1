"""Registers torch.ops.hierkernels.rms_norm_forward and _backward, their fakes and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import is_unwatched
from hierkernels.library import LIBRARY, register
from hierkernels.ops.rms_norm.call import NormCall

_CALL = "Tensor x, Tensor weight, float eps, bool eps_is_added, SymInt shift, ScalarType dtype"
LIBRARY.define(f"rms_norm_forward({_CALL}, str backend) -> (Tensor out, Tensor inverse)")
# wanted: the gradients of x and of weight; those that are, are returned.
LIBRARY.define(
    f"rms_norm_backward({_CALL}, Tensor inverse, Tensor dout, bool[] wanted, str backend) "
    "-> Tensor[]"
)


def _backend(call: NormCall, asked: str) -> ModuleType:
    return dispatch.load_backend("rms_norm", dispatch.resolve("rms_norm", call, asked).backend)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = NormCall(*args[:6])
    return _backend(call, args[6]).forward(call)


def _fake_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return NormCall(*args[:6]).new_outputs()


def _backward(*args: Any) -> list[torch.Tensor]:
    call = NormCall(*args[:6])
    inverse, dout, wanted, backend = args[6:]
    grads = _backend(call, backend).backward(call, inverse, dout, wanted)
    return [g for g, want in zip(grads, wanted, strict=True) if want and g is not None]


def _fake_backward(*args: Any) -> list[torch.Tensor]:
    return [torch.empty_like(t) for t, want in zip(args[:2], args[8], strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, ctx.eps, ctx.eps_is_added, ctx.shift, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, _: Any) -> tuple:
    if dout is None:
        return (None,) * 7
    x, weight, inverse = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    # With create_graph the gradients need a graph, which the operator makes.
    direct = not torch.is_grad_enabled() and is_unwatched((x, weight, inverse, dout))
    backward = _backward if direct else _OPERATOR.backward
    call = (x, weight, ctx.eps, ctx.eps_is_added, ctx.shift, ctx.dtype)
    rest = iter(backward(*call, inverse, dout, wanted, ctx.backend))
    return *(next(rest) if want else None for want in wanted), *(None,) * 5


_OPERATOR = register(
    "rms_norm",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
)


def rms_norm_forward(call: NormCall, backend: str) -> torch.Tensor:
    """out: the operator, or its implementation where nobody sees the difference."""
    tensors = (call.x, call.weight)
    run = _OPERATOR.forward
    if is_unwatched(tensors):
        run = _OPERATOR.eager if torch.is_grad_enabled() else _forward
    return run(*tensors, call.eps, call.eps_is_added, call.shift, call.dtype, backend)[0]
