"""The causal spatial gating unit in Triton: the backend interface round planned launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from hierkernels.ops.causal_sgu import triton_launch as plans
from hierkernels.ops.causal_sgu.call import SguCall, fold_bias, new_like
from hierkernels.refusals import GPU_DTYPES, dtype_reasons
from hierkernels.triton_common.device import device_reasons, target_of
from hierkernels.triton_common.launch import Launch

# Whether the kernels are interpreted is settled when their modules are imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def supports(call: SguCall) -> list[str]:
    """Why the Triton kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("gate", call.gate, INTERPRETED)
    reasons += dtype_reasons(call.gate.dtype, GPU_DTYPES)
    if max(*call.gate.shape, 2 * call.weight.shape[1], call.gate.numel() // 16) >= 2**31:
        reasons.append("sizes beyond 32 bits")
    return reasons


def _run(launches: list[Launch]) -> None:
    for launch in launches:
        launch.run()


def forward(call: SguCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, preactivation)."""
    out, z = call.new_outputs(keep)
    if out.numel():
        _run(plans.plan_forward(call, target_of(call.gate, INTERPRETED), out, z if keep else None))
    return out, z


def backward(
    call: SguCall, preactivation: torch.Tensor, dout: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that are wanted, in the order of GRADIENTS."""
    tensors = (call.residual, call.gate, call.weight, call.bias, call.gate)
    if call.gate.numel() == 0:
        return tuple(
            new_like(t).zero_() if want else None for t, want in zip(tensors, wanted, strict=True)
        )
    target = target_of(call.gate, INTERPRETED)
    B, N, _ = call.gate.shape
    dresidual = new_like(call.residual) if wanted[0] else None
    dmix = new_like(call.gate)
    sums = dmix.new_empty((B, N, call.heads), dtype=torch.float32) if wanted[3] else None
    _run(plans.plan_mix(call, target, preactivation, dout, dresidual, dmix, sums))
    dgate = dweight = dbias = None
    if wanted[1]:
        dgate = new_like(call.gate)
        _run(plans.plan_gate(call, target, dmix, dgate))
    if wanted[2]:
        launches, partial = plans.plan_weight(call, target, dmix)
        _run(launches)
        dweight = (partial[0] if len(partial) == 1 else partial.sum(0)).to(call.weight.dtype)
    if sums is not None:
        dbias = fold_bias(sums.sum(0), call.bias)
    return dresidual, dgate, dweight, dbias, dmix
