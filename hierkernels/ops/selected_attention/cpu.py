"""Selected attention on the CPU: the compiled kernels of csrc/cpu/selected_attention."""

from __future__ import annotations

import torch

from hierkernels.native import native
from hierkernels.ops.selected_attention.call import SelectedCall
from hierkernels.refusals import cpu_reasons

MAX_DIM = 512
MAX_LENGTH = 2**31 - 2**16  # positions and blocks fit 32-bit integers


def supports(call: SelectedCall) -> list[str]:
    """Why the CPU kernels cannot compute this call; empty if they can."""
    reasons = cpu_reasons("q", call.q)
    (_, _, Nq, D), (_, _, Nk, Dv) = call.q.shape, call.v.shape
    if D > MAX_DIM or Dv > MAX_DIM:
        reasons.append(f"head channels above {MAX_DIM}")
    for n, name in ((Nq * call.group, "rows of a key/value head"), (Nk, "keys")):
        if n > MAX_LENGTH:
            reasons.append(f"{n} {name}, at most {MAX_LENGTH} are supported")
    return reasons


def _arguments(call: SelectedCall) -> tuple:
    """Everything, as the compiled core takes it: indices of 64 bits, weights as precise as lse."""
    tensors_and_numbers = call.arguments()
    weights = None if call.weights is None else call.weights.to(call.lse_dtype)
    return (*tensors_and_numbers[:3], call.indices.long(), weights, *tensors_and_numbers[5:])


def forward(call: SelectedCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse)."""
    out, lse = call.new_outputs()
    native().selected_forward(*_arguments(call), out, lse)
    return out, lse


def backward(
    call: SelectedCall,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    weights_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dweights or None)."""
    dq, dk, dv = call.new_gradients()
    dweights = call.new_weights_gradient() if weights_grad else None
    dlse = dlse.to(call.lse_dtype).contiguous() if dlse is not None else None
    native().selected_backward(*_arguments(call), out, lse, dout, dlse, dq, dk, dv, dweights)
    return dq, dk, dv, dweights
