"""hk.gelu: checks the arguments, puts them in canonical form and calls the operator."""

from __future__ import annotations

import math
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.ops.gelu import reference, schema
from hierkernels.ops.gelu.call import FORMS, GeluCall

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make_call(x: torch.Tensor, form: str = "plain") -> GeluCall:
    """Checks the arguments of hk.gelu and returns them in canonical form."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if x.ndim < 1:
        raise ValueError("x must have one dimension or more, (..., channels), got a scalar")
    C = x.shape[-1]
    if form != "plain" and C % 2:
        raise ValueError(f"x must have an even number of channels for form={form!r}, got {C}")
    if x.ndim > 3:
        x = x.reshape(math.prod(x.shape[:-1]), C)
    return GeluCall(x.contiguous(), form)


def run(call: GeluCall, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second) of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend, dispatch.NO_KERNELS["gelu"])
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        return reference.forward(call)
    return schema.gelu(call, name)


def gelu(
    x: torch.Tensor, *, form: str = "plain", backend: str | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Gaussian error linear unit, GELU(x) = x P(X <= x) for X ~ N(0, 1), in one pass each way.

    Args:
        x: (..., C): float32, bfloat16, float16 or float64; copied unless contiguous.
        form: what is given back, of the two halves (a, b) of the channels:
            "plain": GELU(x), (..., C);
            "halves": GELU(a) and GELU(b), two contiguous tensors (..., C / 2), whose gradients
            need not be put together first;
            "gated": a GELU(b), (..., C / 2).
        backend: "triton", "cpu" or "reference"; None = the fastest supported, also where
            "cuda" is forced for all operators: it has no such kernel.

    Returns:
        One tensor, or two for "halves", in the dtype of x, computed in float32 (float64 for
        float64) and rounded once.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value or dtype.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to:
        F.gelu(x);  F.gelu(x).chunk(2, dim=-1);  a * F.gelu(b) for a, b = x.chunk(2, dim=-1)

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2; gated: Shazeer,
        "GLU Variants Improve Transformer" (2020), GEGLU with its halves exchanged.
    """
    call = make_call(x, form)
    first, second = run(call, backend)
    if x.ndim > 3:
        first = first.view(*x.shape[:-1], call.channels)
        second = second.view(first.shape) if form == "halves" else second
    return (first, second) if form == "halves" else first


def problem(x: torch.Tensor, **options: Any) -> GeluCall:
    """The canonical form of a call, as hk.gelu makes it."""
    return make_call(x, **options)
