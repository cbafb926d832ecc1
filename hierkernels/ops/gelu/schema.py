"""Registers torch.ops.hierkernels.gelu_forward and _backward, their fakes and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import is_unwatched
from hierkernels.library import LIBRARY, register
from hierkernels.ops.gelu.call import GeluCall

LIBRARY.define("gelu_forward(Tensor x, str form, str backend) -> (Tensor first, Tensor second)")
LIBRARY.define(
    "gelu_backward(Tensor x, str form, Tensor dfirst, Tensor dsecond, str backend) -> Tensor"
)


def _backend(call: GeluCall, asked: str) -> ModuleType:
    return dispatch.module_for("gelu", call, asked)


def _forward(x: torch.Tensor, form: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    call = GeluCall(x, form)
    return _backend(call, backend).forward(call)


def _fake_forward(x: torch.Tensor, form: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return GeluCall(x, form).new_outputs()


def _backward(
    x: torch.Tensor, form: str, dfirst: torch.Tensor, dsecond: torch.Tensor, backend: str
) -> torch.Tensor:
    call = GeluCall(x, form)
    return _backend(call, backend).backward(call, dfirst, dsecond)


def _fake_backward(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, ctx.form, ctx.backend = inputs
    ctx.save_for_backward(x)
    if ctx.form != "halves":
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dfirst: torch.Tensor, dsecond: torch.Tensor) -> tuple:
    (x,) = ctx.saved_tensors
    # With create_graph the gradient needs a graph, which the operator makes.
    direct = not torch.is_grad_enabled() and is_unwatched((x, dfirst, dsecond))
    backward = _backward if direct else _OPERATOR.backward
    return backward(x, ctx.form, dfirst, dsecond, ctx.backend), None, None


_OPERATOR = register(
    "gelu", (_forward, _fake_forward), (_backward, _fake_backward), _setup_context, _differentiate
)


def gelu(call: GeluCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second): the operator, or its implementation where nobody sees the difference."""
    run = _OPERATOR.forward
    if is_unwatched((call.x,)):
        run = _OPERATOR.eager if torch.is_grad_enabled() else _forward
    return run(call.x, call.form, backend)
