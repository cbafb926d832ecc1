"""Registers torch.ops.hierkernels.attention_forward and _backward, their fakes and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import is_unwatched
from hierkernels.key_range import KeyRange
from hierkernels.library import LIBRARY, register
from hierkernels.ops.attention.call import AttentionCall, unit_stride

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? padding, Tensor? seed, "
    "SymInt[] key_range, float scale, float softcap, float dropout_p, "
    "SymInt bias_width, SymInt bias_before"
)
_ARGUMENTS = 13  # of _CALL
LIBRARY.define(f"attention_forward({_CALL}, str backend) -> (Tensor out, Tensor lse)")
LIBRARY.define(
    f"attention_backward({_CALL}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    "bool bias_grad, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def _call(args: tuple) -> AttentionCall:
    q, k, v, bias, mask, padding, seed, key_range, *numbers = args[:_ARGUMENTS]
    return AttentionCall(
        q, k, v, bias, mask, padding, seed, KeyRange.from_ints(key_range), *numbers
    )


def _backend(call: AttentionCall, asked: str) -> ModuleType:
    return dispatch.module_for("attention", call, asked)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(args)
    return _backend(call, args[_ARGUMENTS]).forward(call)


def _fake_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _call(args).new_outputs()


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call = _call(args)
    out, lse, dout, dlse, bias_grad, backend = args[_ARGUMENTS:]
    *grads, dbias = _backend(call, backend).backward(
        call, out, lse, unit_stride(dout), dlse, bias_grad
    )
    if dbias is None:
        return *grads, call.q.new_empty(0)
    assert call.bias is not None
    return *grads, dbias.to(call.bias.dtype)


def _fake_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call = _call(args)
    bias_grad = args[-2]
    dbias = (
        call.bias.new_empty(call.bias.shape)
        if bias_grad and call.bias is not None
        else call.q.new_empty(0)
    )
    return *call.new_gradients(), dbias


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.numbers, ctx.backend = inputs[:7], inputs[7:_ARGUMENTS], inputs[_ARGUMENTS]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 14
    if dout is None:
        dout = torch.zeros_like(out)
    # With create_graph the gradients need a graph, which the operator makes.
    direct = not torch.is_grad_enabled() and is_unwatched((*tensors, out, lse, dout, dlse))
    backward = _backward if direct else _OPERATOR.backward
    dq, dk, dv, dbias = backward(
        *tensors, *ctx.numbers, out, lse, dout, dlse, ctx.needs_input_grad[3], ctx.backend
    )
    return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None, *(None,) * 10


_OPERATOR = register(
    "attention",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
)


def attention_forward(call: AttentionCall, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): the operator, or its implementation where nobody sees the difference.

    Raises NotImplementedError if `backend` is given and refuses.
    """
    tensors = call.q, call.k, call.v, call.bias, call.mask, call.padding, call.seed
    run = _OPERATOR.forward
    if is_unwatched(tensors):
        needs_graph = torch.is_grad_enabled() and (
            call.q.requires_grad
            or call.k.requires_grad
            or call.v.requires_grad
            or (call.bias is not None and call.bias.requires_grad)
        )
        if not needs_graph:
            return _backend(call, backend).forward(call)
        run = _OPERATOR.eager
    return run(*call.arguments(), backend)
