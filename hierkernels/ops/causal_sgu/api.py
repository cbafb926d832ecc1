"""hk.causal_sgu: checks the arguments, puts them in canonical form and calls the operator."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import autocast, check_parameter_dtype
from hierkernels.ops.attention.call import unit_stride
from hierkernels.ops.causal_sgu import reference
from hierkernels.ops.causal_sgu import schema as schema  # registers the operators
from hierkernels.ops.causal_sgu.call import ACTIVATIONS, SguCall

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_activations(tensors: dict[str, Any]) -> None:
    """residual, gate and gate_residual: alike in shape, dtype and device."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    gate = tensors["gate"]
    shape, dtype, device = gate.shape, gate.dtype, gate.device
    if len(shape) != 3:
        raise ValueError(
            f"gate must have 3 dimensions (batch, tokens, channels), got shape {tuple(shape)}"
        )
    if dtype not in _FLOATS:
        raise TypeError(f"gate must be float32, bfloat16, float16 or float64, got {dtype}")
    for name, t in tensors.items():
        if t is gate:
            continue
        if t.shape != shape:
            raise ValueError(
                f"{name} must have the shape of gate {tuple(shape)}, got {tuple(t.shape)}"
            )
        if t.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of gate ({dtype}), got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name} must be on the device of gate ({device}), got {t.device}")


def _check_window(window: Any) -> int:
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, int | torch.SymInt):
        raise TypeError(f"window must be an int or None, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1, or None for the global unit, got {window}")
    return window  # type: ignore[return-value]  # a SymInt is as good


def _check_parameters(gate: torch.Tensor, weight: Any, bias: Any, window: int) -> None:
    for name, t in (("weight", weight), ("bias", bias)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    shape = f"(heads, {window}, {2 * window})" if window else "(heads, size, size)"
    if weight.ndim != 3:
        raise ValueError(f"weight must have shape {shape}, got {tuple(weight.shape)}")
    H, rows, columns = weight.shape
    if (rows, columns) != (window, 2 * window) if window else rows != columns:
        raise ValueError(f"weight must have shape {shape}, got {tuple(weight.shape)}")
    if H == 0 or gate.shape[2] % H:
        raise ValueError(
            f"weight must have a number of heads that divides the {gate.shape[2]} channels of "
            f"gate, got {H} heads"
        )
    if not window and gate.shape[1] > rows:
        raise ValueError(
            f"weight must have a size of at least the {gate.shape[1]} tokens of gate, got {rows}"
        )
    if bias.shape != (H, rows):
        raise ValueError(f"bias must have shape {(H, rows)}, got {tuple(bias.shape)}")
    check_parameter_dtype("weight", weight, "gate", gate.dtype)
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias must have the dtype of weight ({weight.dtype}), got {bias.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.device != gate.device:
            raise ValueError(
                f"{name} must be on the device of gate ({gate.device}), got {t.device}"
            )


def make_call(
    residual: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    window: int | None = None,
    gate_residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> SguCall:
    """Checks the arguments of hk.causal_sgu and returns them in canonical form."""
    tensors = {"gate": gate, "residual": residual}
    if gate_residual is not None:
        tensors["gate_residual"] = gate_residual
    _check_activations(tensors)
    width = _check_window(window)
    _check_parameters(gate, weight, bias, width)
    if activation is not None and (activation == "none" or activation not in ACTIVATIONS):
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS[1:])} or None, got {activation!r}"
        )
    return SguCall(
        unit_stride(residual), unit_stride(gate), unit_stride(weight), unit_stride(bias),
        None if gate_residual is None else unit_stride(gate_residual), width, activation or "none",
    )  # fmt: skip


def _needs_grad(call: SguCall) -> bool:
    tensors = (call.residual, call.gate, call.weight, call.bias, call.gate_residual)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run(call: SguCall, backend: str | None) -> torch.Tensor:
    """out of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend)
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        return reference.causal_sgu(call)
    return schema.causal_sgu_forward(call, _needs_grad(call), name)


def causal_sgu(
    residual: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    window: int | None = None,
    gate_residual: torch.Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal spatial gating unit, act(mix(gate) + bias + gate_residual) * residual.

    mix(gate)[b, i, c] = sum over j <= i of weight[h, i, j] gate[b, j, c], where head h has the
    channels c of its H-th part, h = c // (C / H). With a window w, token i = c w + r of bucket c
    sums over j from max(0, (c - 1) w) to i with weight[h, r, j - (c - 1) w], and takes bias[h, r].

    Args:
        residual: (B, N, C), N >= 0 tokens: float32, bfloat16, float16 or float64, any strides.
        gate: (B, N, C), as residual.
        weight: (H, S, S), S >= N, or (H, w, 2 w) with a window; of the gate's dtype, or float32
            beside 16-bit activations (it is then rounded to their dtype where they meet, as under
            autocast). What would weigh the future is never read, and its gradient is 0.
        bias: (H, S), or (H, w) with a window; in the dtype of weight.
        window: w >= 1 for the windowed unit; None = global.
        gate_residual: (B, N, C), as residual.
        activation: "relu", "gelu" (exact), "silu", "tanh", "sigmoid", or None.
        backend: "cuda", "triton", "cpu" or "reference"; None = the fastest supported.

    Returns:
        (B, N, C) in the dtype of gate. Sums are float32 (float64 for float64). Gradients, for
        every tensor, are bitwise repeatable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (global, one head):
        activation(weight[0, :N, :N].tril() @ gate + bias[0, :N, None] + gate_residual) * residual

    Source: Liu et al., "Pay Attention to MLPs" (2021), section 2; the causal, multi-headed and
        windowed forms are those of the package g-mlp-gpt.
    """
    residual, gate, gate_residual = autocast(residual, gate, gate_residual)
    call = make_call(
        residual, gate, weight, bias, window=window, gate_residual=gate_residual,
        activation=activation,
    )  # fmt: skip
    return run(call, backend)


def problem(
    residual: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    gate_residual: torch.Tensor | None = None,
    **options: Any,
) -> SguCall:
    """The canonical form of a call, as hk.causal_sgu makes it."""
    residual, gate, gate_residual = autocast(residual, gate, gate_residual)
    return make_call(residual, gate, weight, bias, gate_residual=gate_residual, **options)
