"""The causal spatial gating unit in CUDA C++: the compiled kernels of csrc/cuda/sgu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hierkernels.cuda_core import core, device_reasons, on_device_of, stream_of
from hierkernels.ops.causal_sgu.call import ACTIVATIONS, SguCall, fold_bias, new_like
from hierkernels.refusals import GPU_DTYPES, dtype_reasons

_MAX_LENGTH = 2**31 - 2**16  # kernels count in 32 bits, up to a tile beyond the last
_MIN_TILE = 64  # rows or columns; there are at most 2**31 - 1 blocks


def supports(call: SguCall) -> list[str]:
    """Why the CUDA kernels cannot compute this call; empty if they can."""
    reasons = device_reasons("gate", call.gate)
    reasons += dtype_reasons(call.gate.dtype, GPU_DTYPES)
    B, N, C = call.gate.shape
    H, rows, columns = call.weight.shape
    lengths = ((N, "tokens"), (B * C // H, "columns (batch x channels of a head)"))
    for n, name in (*lengths, (columns, "columns of the weight"), (B * N, "tokens of the batch")):
        if n > _MAX_LENGTH:
            reasons.append(f"{n} {name}, at most {_MAX_LENGTH} are supported")
    tiles_across = B * C // H // _MIN_TILE + 1
    tiles = H * max(-(-N // call.size) * (call.size // _MIN_TILE + 1) * tiles_across, 1) if N else 0
    of_weight = 2 * H * (rows // _MIN_TILE + 1) ** 2
    if max(tiles, of_weight, B * N * H // 8) >= 2**31:
        reasons.append("more tiles than a launch can have")
    if B * -(-max(N, 1) // (call.size or 1)) * (C // H // 16 + 1) >= 2**31:
        reasons.append("more steps of the weight's gradient than 32 bits count")
    tensors = {
        "residual": call.residual, "gate": call.gate, "weight": call.weight, "bias": call.bias,
        "gate_residual": call.gate_residual,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % tensor.element_size():
            reasons.append(f"{name} is not aligned to its elements")
    return reasons


def _problem(call: SguCall) -> tuple:
    return (
        call.residual, call.gate, call.weight, call.bias, call.gate_residual, call.window,
        ACTIVATIONS.index(call.activation),
    )  # fmt: skip


def forward(call: SguCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, preactivation)."""
    out, z = call.new_outputs(keep)
    if out.numel():
        with on_device_of(call.gate):
            core().cuda_sgu_forward(*_problem(call), out, z if keep else None, stream_of(call.gate))
    return out, z


def backward(
    call: SguCall, preactivation: torch.Tensor, dout: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that are wanted, in the order of GRADIENTS."""
    tensors = (call.residual, call.gate, call.weight, call.bias, call.gate)
    grads = [new_like(t) if want else None for t, want in zip(tensors, wanted, strict=True)]
    if call.gate.numel() == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    dresidual, dgate, dweight, dbias, dmix = grads
    B, N, _ = call.gate.shape
    dmix = new_like(call.gate) if dmix is None else dmix
    sums = dmix.new_empty((B, N, call.heads), dtype=torch.float32) if wanted[3] else None
    parts = None
    if dweight is not None:
        splits = core().cuda_sgu_weight_splits(*_problem(call))
        dtype = dweight.dtype if splits == 1 else torch.float32
        parts = dweight.new_empty((splits, *dweight.shape), dtype=dtype)
    with on_device_of(call.gate):
        core().cuda_sgu_backward(
            *_problem(call), preactivation, dout, dresidual, dgate, parts, sums, dmix,
            stream_of(call.gate),
        )  # fmt: skip
    if parts is not None:
        dweight = (parts[0] if len(parts) == 1 else parts.sum(0)).to(call.weight.dtype)
    if sums is not None:
        dbias = fold_bias(sums.sum(0), call.bias)
    return dresidual, dgate, dweight, dbias, dmix
