"""hk.layer_norm: the operator of hk.rms_norm, with a bias."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels.ops.rms_norm.api import make_call, run
from hierkernels.ops.rms_norm.call import NormCall


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    shift: int = 0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Layer norm of tokens, (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, s being x shifted.

    Token shift is that of hk.rms_norm: it delays the second half of the channels by `shift` tokens.

    Args:
        x: (..., N, C), C >= 1: float32, bfloat16, float16 or float64; copied unless contiguous.
        weight, bias: (C) in the dtype of x, or both float32 beside 16-bit x.
        eps: above 0, added to the variance, which is the mean squared distance from the mean.
        shift: tokens of delay, 0 or more; 0 = no token shift.
        dtype: of the result: that of x, float32 beside 16-bit x, or 16-bit beside float32 x (what
            a product under autocast would round it to). None = x and weight, promoted.
        backend: "triton", "cpu" or "reference"; None = the fastest supported, also where
            "cuda" is forced for all operators: it has no such kernel.

    Returns:
        (..., N, C). Sums are float32 (float64 for float64). All gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (shift=0):
        torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.
    """
    call = problem(x, weight, bias, eps=eps, shift=shift, dtype=dtype)
    out = run(call, backend)
    return out if x.ndim == 3 else out.view(x.shape)


def problem(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-5, **options: Any
) -> NormCall:
    """The canonical form of a call, as hk.layer_norm makes it."""
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias must be a torch.Tensor, got {type(bias).__name__}")
    return make_call(x, weight, bias=bias, eps=eps, eps_is_added=True, **options)
