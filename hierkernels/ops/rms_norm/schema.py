"""Registers torch.ops.hierkernels.rms_norm_forward and _backward, their fakes and autograd.

Layer norms are calls of the same operator, with a bias.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import is_unwatched
from hierkernels.library import LIBRARY, register
from hierkernels.ops.rms_norm.call import NormCall

_CALL = (
    "Tensor x, Tensor weight, Tensor? bias, float eps, bool eps_is_added, SymInt shift, "
    "ScalarType dtype"
)
LIBRARY.define(
    f"rms_norm_forward({_CALL}, str backend) -> (Tensor out, Tensor inverse, Tensor mean)"
)
# wanted: the gradients of x, weight and bias, if there is one; those that are, are returned.
LIBRARY.define(
    f"rms_norm_backward({_CALL}, Tensor inverse, Tensor mean, Tensor dout, bool[] wanted, "
    "str backend) -> Tensor[]"
)
_ARGUMENTS = 7  # of a call


def _backend(call: NormCall, asked: str) -> ModuleType:
    return dispatch.module_for("rms_norm", call, asked)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = NormCall(*args[:_ARGUMENTS])
    return _backend(call, args[_ARGUMENTS]).forward(call)


def _fake_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return NormCall(*args[:_ARGUMENTS]).new_outputs()


def _backward(*args: Any) -> list[torch.Tensor]:
    call = NormCall(*args[:_ARGUMENTS])
    inverse, mean, dout, wanted, backend = args[_ARGUMENTS:]
    grads = _backend(call, backend).backward(call, inverse, mean, dout, wanted)
    return [g for g, want in zip(grads, wanted, strict=True) if want and g is not None]


def _fake_backward(*args: Any) -> list[torch.Tensor]:
    wanted = args[_ARGUMENTS + 3]
    return [torch.empty_like(t) for t, want in zip(args[:3], wanted, strict=False) if want]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, ctx.eps, ctx.eps_is_added, ctx.shift, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, *_: Any) -> tuple:
    if dout is None:
        return (None,) * (_ARGUMENTS + 1)
    *tensors, inverse, mean = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    if tensors[2] is None:
        wanted.pop()
    # With create_graph the gradients need a graph, which the operator makes.
    direct = not torch.is_grad_enabled() and is_unwatched((*tensors, inverse, dout))
    backward = _backward if direct else _OPERATOR.backward
    call = (*tensors, ctx.eps, ctx.eps_is_added, ctx.shift, ctx.dtype)
    rest = iter(backward(*call, inverse, mean, dout, wanted, ctx.backend))
    grads = [next(rest) if want else None for want in wanted]
    return *grads, *(None,) * (_ARGUMENTS + 1 - len(grads))


_OPERATOR = register(
    "rms_norm",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    only_first=True,
)


def norm(call: NormCall, backend: str) -> torch.Tensor:
    """out: the operator, or its implementation where nobody sees the difference."""
    tensors = (call.x, call.weight, call.bias)
    arguments = (*tensors, call.eps, call.eps_is_added, call.shift, call.dtype, backend)
    if not is_unwatched(tensors):
        return _OPERATOR.forward(*arguments)[0]
    if torch.is_grad_enabled():
        return _OPERATOR.eager(*arguments)
    return _backend(call, backend).forward(call)[0]
