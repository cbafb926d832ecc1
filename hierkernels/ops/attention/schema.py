"""Registers torch.ops.hierkernels.attention_forward and _backward, their fakes and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.key_range import KeyRange
from hierkernels.library import LIBRARY
from hierkernels.ops.attention.call import AttentionCall, unit_stride

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? padding, Tensor? seed, "
    "SymInt[] key_range, float scale, float softcap, float dropout_p"
)
_SLOTS = "SymInt bias_width=0, SymInt bias_before=0"
LIBRARY.define(f"attention_forward({_CALL}, str backend, {_SLOTS}) -> (Tensor out, Tensor lse)")
LIBRARY.define(
    f"attention_backward({_CALL}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    f"bool bias_grad, str backend, {_SLOTS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def _call(args: tuple, slots: tuple) -> AttentionCall:
    q, k, v, bias, mask, padding, seed, ints, scale, softcap, dropout_p = args
    key_range = KeyRange.from_ints(ints)
    width, before = (*slots, 0, 0)[:2]  # the dispatcher leaves out trailing defaults
    return AttentionCall(
        q, k, v, bias, mask, padding, seed, key_range, scale, softcap, dropout_p, width, before
    )


def _backend(call: AttentionCall, asked: str) -> ModuleType:
    return dispatch.load_backend("attention", dispatch.resolve("attention", call, asked).backend)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(args[:11], args[12:])
    return _backend(call, args[11]).forward(call)


def _fake_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _call(args[:11], args[12:]).new_outputs()


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call = _call(args[:11], args[17:])
    out, lse, dout, dlse, bias_grad, backend = args[11:17]
    *grads, dbias = _backend(call, backend).backward(
        call, out, lse, unit_stride(dout), dlse, bias_grad
    )
    if dbias is None:
        return *grads, call.q.new_empty(0)
    assert call.bias is not None
    return *grads, dbias.to(call.bias.dtype)


def _fake_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call = _call(args[:11], args[17:])
    bias_grad = args[15]
    dbias = (
        call.bias.new_empty(call.bias.shape)
        if bias_grad and call.bias is not None
        else call.q.new_empty(0)
    )
    return *call.new_gradients(), dbias


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.key_range, ctx.scale, ctx.softcap, ctx.dropout_p, ctx.backend = inputs[:12]
    ctx.slots = inputs[12:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 14
    dq, dk, dv, dbias = torch.ops.hierkernels.attention_backward.default(
        *tensors, ctx.key_range, ctx.scale, ctx.softcap, ctx.dropout_p, out, lse,
        torch.zeros_like(out) if dout is None else dout, dlse, ctx.needs_input_grad[3], ctx.backend,
        *ctx.slots,
    )  # fmt: skip
    return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None, *(None,) * 10


def _differentiate_twice(ctx: Any, *grads: torch.Tensor) -> tuple:
    raise NotImplementedError(
        "attention: the kernels have no second derivative; backend='reference' is differentiable "
        "any number of times"
    )


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("attention_forward", _forward, _key)
    LIBRARY.impl("attention_backward", _backward, _key)
torch.library.register_fake("hierkernels::attention_forward", _fake_forward, lib=LIBRARY)
torch.library.register_fake("hierkernels::attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "hierkernels::attention_forward", _differentiate, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "hierkernels::attention_backward", _differentiate_twice, lib=LIBRARY
)
