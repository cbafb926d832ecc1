"""Registers torch.ops.hierkernels.causal_sgu_forward and _backward, their fakes and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.eager import is_unwatched
from hierkernels.library import LIBRARY, register
from hierkernels.ops.attention.call import unit_stride
from hierkernels.ops.causal_sgu.call import SguCall, new_like

_CALL = (
    "Tensor residual, Tensor gate, Tensor weight, Tensor bias, Tensor? gate_residual, "
    "SymInt window, str activation"
)
# keep: return the pre-activation, which the backward starts from; else it is empty.
LIBRARY.define(f"causal_sgu_forward({_CALL}, bool keep, str backend) -> (Tensor out, Tensor z)")
# wanted: for each of GRADIENTS, whether it is; those that are, are returned.
LIBRARY.define(
    f"causal_sgu_backward({_CALL}, Tensor z, Tensor dout, bool[] wanted, str backend) -> Tensor[]"
)


def _backend(call: SguCall, asked: str) -> ModuleType:
    return dispatch.module_for("causal_sgu", call, asked)


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call, keep = SguCall(*args[:7]), args[7]
    return _backend(call, args[8]).forward(call, keep)


def _fake_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return SguCall(*args[:7]).new_outputs(args[7])


def _backward(*args: Any) -> list[torch.Tensor]:
    call = SguCall(*args[:7])
    z, dout, wanted, backend = args[7:]
    grads = _backend(call, backend).backward(call, z, unit_stride(dout), wanted)
    return [g for g, want in zip(grads, wanted, strict=True) if want and g is not None]


def _fake_backward(*args: Any) -> list[torch.Tensor]:
    residual, gate, weight, bias = args[:4]
    tensors = (residual, gate, weight, bias, gate)
    return [new_like(t) for t, want in zip(tensors, args[9], strict=True) if want]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, gate_residual, ctx.window, ctx.activation, ctx.keep, ctx.backend = inputs
    # The gate's residual enters the pre-activation alone, and that is saved if it is kept.
    ctx.save_for_backward(*tensors, None if ctx.keep else gate_residual, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: torch.Tensor | None, *_: Any) -> tuple:
    if dout is None:
        return (None,) * 9
    *tensors, z = ctx.saved_tensors
    if not ctx.keep:
        _, z = _OPERATOR.forward(*tensors, ctx.window, ctx.activation, True, ctx.backend)
    wanted = list(ctx.needs_input_grad[:5])
    # With create_graph the gradients need a graph, which the operator makes.
    direct = not torch.is_grad_enabled() and is_unwatched((*tensors, z, dout))
    backward = _backward if direct else _OPERATOR.backward
    grads = backward(*tensors, ctx.window, ctx.activation, z, dout, wanted, ctx.backend)
    rest = iter(grads)
    return *(next(rest) if want else None for want in wanted), *(None,) * 4


_OPERATOR = register(
    "causal_sgu",
    (_forward, _fake_forward),
    (_backward, _fake_backward),
    _setup_context,
    _differentiate,
    only_first=True,
)


def causal_sgu_forward(call: SguCall, keep: bool, backend: str) -> torch.Tensor:
    """out: the operator, or its implementation where nobody sees the difference.

    keep says whether there will be a backward. Raises NotImplementedError if `backend` is given
    and refuses.
    """
    tensors = (call.residual, call.gate, call.weight, call.bias, call.gate_residual)
    arguments = (*tensors, call.window, call.activation, keep, backend)
    if not is_unwatched(tensors):
        return _OPERATOR.forward(*arguments)[0]
    if keep:
        return _OPERATOR.eager(*arguments)
    return _backend(call, backend).forward(call, keep)[0]
