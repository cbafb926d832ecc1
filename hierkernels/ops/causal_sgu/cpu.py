"""The causal spatial gating unit on the CPU: the compiled kernels of csrc/cpu/sgu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hierkernels.native import native
from hierkernels.ops.causal_sgu.call import ACTIVATIONS, SguCall, new_like
from hierkernels.refusals import cpu_reasons


def supports(call: SguCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    return cpu_reasons("gate", call.gate)


def _problem(call: SguCall) -> tuple:
    return (
        call.residual, call.gate, call.weight, call.bias, call.gate_residual, call.window,
        ACTIVATIONS.index(call.activation),
    )  # fmt: skip


def forward(call: SguCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, preactivation)."""
    out, z = call.new_outputs(keep)
    if out.numel():
        native().sgu_forward(*_problem(call), out, z if keep else None)
    return out, z


def backward(
    call: SguCall, preactivation: torch.Tensor, dout: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that are wanted, in the order of GRADIENTS."""
    tensors = (call.residual, call.gate, call.weight, call.bias, call.gate)
    grads = tuple(new_like(t) if want else None for t, want in zip(tensors, wanted, strict=True))
    if call.gate.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    native().sgu_backward(*_problem(call), preactivation, dout, *grads)
    return grads
