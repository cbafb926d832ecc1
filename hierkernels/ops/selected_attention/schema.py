"""Registers torch.ops.hierkernels.selected_attention_forward and _backward, fakes and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import is_unwatched
from hierkernels.library import LIBRARY, register
from hierkernels.ops.attention.call import unit_stride
from hierkernels.ops.selected_attention.call import SelectedCall

_OP = "selected_attention"
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? weights, SymInt block_size, "
    "bool include_own_block, bool is_causal, float scale"
)
_ARGUMENTS = 9  # of _CALL
# check: whether an index out of range is an error; it is looked for here, where values are known
# under a compiler, too.
LIBRARY.define(f"{_OP}_forward({_CALL}, bool check, str backend) -> (Tensor out, Tensor lse)")
LIBRARY.define(
    f"{_OP}_backward({_CALL}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    "bool weights_grad, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dweights)"
)


def check_values(call: SelectedCall) -> None:
    """Raises ValueError if an index is neither -1 nor the number of a block."""
    if call.indices.numel() == 0:
        return
    least, most = (int(x) for x in call.indices.aminmax())
    if least < -1 or most >= call.blocks:
        wrong = least if least < -1 else most
        raise ValueError(
            f"block_indices must be at least -1 (none) and below ceil(keys / block_size) = "
            f"{call.blocks}, got {wrong}"
        )


def _backend(call: SelectedCall, asked: str) -> ModuleType:
    return dispatch.module_for(_OP, call, asked)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = SelectedCall(*args[:_ARGUMENTS])
    check, backend = args[_ARGUMENTS:]
    if check:
        check_values(call)
    return _backend(call, backend).forward(call)


def _fake_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return SelectedCall(*args[:_ARGUMENTS]).new_outputs()


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call = SelectedCall(*args[:_ARGUMENTS])
    out, lse, dout, dlse, weights_grad, backend = args[_ARGUMENTS:]
    *grads, dweights = _backend(call, backend).backward(
        call, out, lse, unit_stride(dout), dlse, weights_grad
    )
    if dweights is None:
        return *grads, call.q.new_empty(0)
    assert call.weights is not None
    return *grads, dweights.to(call.weights.dtype)


def _fake_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    call = SelectedCall(*args[:_ARGUMENTS])
    dweights = call.q.new_empty(0)
    if args[-2]:
        assert call.weights is not None
        dweights = call.weights.new_empty(call.weights.shape)
    return *call.new_gradients(), dweights


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.numbers, ctx.backend = inputs[:5], inputs[5:_ARGUMENTS], inputs[-1]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 11
    if dout is None:
        dout = torch.zeros_like(out)
    weights_grad = ctx.needs_input_grad[4]
    # With create_graph the gradients need a graph, which the operator makes.
    direct = not torch.is_grad_enabled() and is_unwatched((*tensors, out, lse, dout, dlse))
    backward = _backward if direct else _OPERATOR.backward
    dq, dk, dv, dweights = backward(
        *tensors, *ctx.numbers, out, lse, dout, dlse, weights_grad, ctx.backend
    )
    return dq, dk, dv, None, dweights if weights_grad else None, *(None,) * 6


_OPERATOR = register(
    _OP,
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
)


def selected_attention_forward(
    call: SelectedCall, check: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): the operator, or its implementation where nobody sees the difference.

    Raises ValueError if `check` finds an index out of range, NotImplementedError if `backend` is
    given and refuses.
    """
    tensors = (call.q, call.k, call.v, call.indices, call.weights)
    run = _OPERATOR.forward
    if is_unwatched(tensors):
        needs_graph = torch.is_grad_enabled() and any(
            [t is not None and t.requires_grad for t in tensors]
        )
        run = _OPERATOR.eager if needs_graph else _forward
    return run(*call.arguments(), check, backend)
