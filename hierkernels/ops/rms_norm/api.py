"""hk.rms_norm: checks the arguments, puts them in canonical form and calls the operator."""

from __future__ import annotations

import math
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import HALVES, check_flag, check_int, check_parameter_dtype
from hierkernels.ops.rms_norm import reference
from hierkernels.ops.rms_norm import schema as schema  # registers the operators
from hierkernels.ops.rms_norm.call import NormCall

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_tensors(x: Any, weight: Any, bias: Any) -> None:
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, t in {"x": x, **parameters}.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in _FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {dtype}")
    if len(shape) < 2 or shape[-1] < 1:
        raise ValueError(
            "x must have 2 dimensions or more, (..., tokens, channels), and at least one channel, "
            f"got shape {tuple(shape)}"
        )
    for name, t in parameters.items():
        if t.shape != shape[-1:]:
            raise ValueError(
                f"{name} must have one element a channel, shape {tuple(shape[-1:])}, got "
                f"{tuple(t.shape)}"
            )
        check_parameter_dtype(name, t, "x", dtype)
        if t.device != device:
            raise ValueError(f"{name} must be on the device of x ({device}), got {t.device}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(
            f"weight and bias must have the same dtype, got {weight.dtype} and {bias.dtype}"
        )


def _check_eps(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, float | int):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be above 0 and finite, got {eps}")


def _output_dtype(x: torch.Tensor, weight: torch.Tensor, dtype: Any) -> torch.dtype:
    if dtype is None:
        return torch.promote_types(x.dtype, weight.dtype)
    if dtype == x.dtype:
        return dtype
    allowed: tuple[torch.dtype, ...] = (x.dtype,)
    if x.dtype in HALVES:
        allowed = (x.dtype, torch.float32)
    elif x.dtype == torch.float32:
        allowed = (torch.float32, *HALVES)
    if dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise TypeError(f"dtype must be one of {names} or None where x is {x.dtype}, got {dtype!r}")
    return dtype


def make_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    eps: float = 1e-8,
    eps_is_added: bool = False,
    shift: int = 0,
    dtype: torch.dtype | None = None,
) -> NormCall:
    """Checks the arguments of a norm and returns them in canonical form."""
    _check_tensors(x, weight, bias)
    _check_eps(eps)
    check_flag("eps_is_added", eps_is_added)
    check_int("shift", shift, 0, 2**62)
    to = _output_dtype(x, weight, dtype)
    if x.ndim != 3:
        N, C = x.shape[-2:]
        x = x.reshape(math.prod(x.shape[:-2]), N, C)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return NormCall(x.contiguous(), weight, bias, float(eps), eps_is_added, shift, to)


def run(call: NormCall, backend: str | None) -> torch.Tensor:
    """out (B, N, C) of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend, dispatch.NO_KERNELS["rms_norm"])
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        return reference.norm(call)
    return schema.norm(call, name)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-8,
    eps_is_added: bool = False,
    shift: int = 0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Root-mean-square norm of tokens, s / max(rms(s), eps) * weight, s being x after token shift.

    Token shift delays the second half of the channels by `shift` tokens: s[n, c] = x[n, c] in the
    first half (the larger one, if C is odd), x[n - shift, c] in the second, 0 where n < shift. As
    a floor, eps leaves ordinary tokens normalised exactly.

    Args:
        x: (..., N, C), C >= 1: float32, bfloat16, float16 or float64; copied unless contiguous.
        weight: (C) in the dtype of x, or float32 beside 16-bit x.
        eps: above 0: the least root mean square that a token is divided by, or, if it is added, of
            the mean square: s / sqrt(mean(s^2) + eps), as F.rms_norm has it.
        eps_is_added: which of the two.
        shift: tokens of delay, 0 or more; 0 = no token shift.
        dtype: of the result: that of x, float32 beside 16-bit x, or 16-bit beside float32 x (what
            a product under autocast would round it to). None = x and weight, promoted.
        backend: "triton", "cpu" or "reference"; None = the fastest supported, also where
            "cuda" is forced for all operators: it has no such kernel.

    Returns:
        (..., N, C). Sums are float32 (float64 for float64). Both gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (shift=0):
        x / (x.norm(dim=-1, keepdim=True) * C**-0.5).clamp(min=eps) * weight

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4; token
        shift is that of RWKV (Peng et al., 2023, section 3.1.1) with a mix of 0 and 1.
    """
    call = make_call(x, weight, eps=eps, eps_is_added=eps_is_added, shift=shift, dtype=dtype)
    out = run(call, backend)
    return out if x.ndim == 3 else out.view(x.shape)


def problem(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> NormCall:
    """The canonical form of a call, as hk.rms_norm makes it."""
    return make_call(x, weight, **options)
