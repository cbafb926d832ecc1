"""Products with a weight, by the quicker of the libraries that PyTorch brings along.

On CPUs in float32, F.linear asks MKL, which is slow on processors that it was not made for; oneDNN,
which PyTorch uses for bfloat16, is up to 1.7 times as fast there, and no slower elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hierkernels import dispatch
from hierkernels.eager import is_unwatched


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear: ``x (..., K), weight (N, K), bias (N)`` to ``(..., N)``; its errors, its results.

    Within hk.use_backend("reference") it is F.linear itself.
    """
    if _gains(x, weight, bias):
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(
            *x.shape[:-1], weight.shape[0]
        )
    return F.linear(x, weight, bias)


def _gains(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Plain float32 tensors of shapes that fit, of more rows than one, outside of autocast."""
    return (
        x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.is_cpu
        and x.ndim > 1
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() > x.shape[-1]
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and _HAS_ONEDNN
        and bool(torch.backends.mkldnn.enabled)
        and dispatch.requested_backend(None) != "reference"
        and is_unwatched((x, weight, bias))
    )


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            # With create_graph the gradient needs a graph.
            plain = not torch.is_grad_enabled() and is_unwatched((dout, weight))
            dx = _product(dout, weight.mT, None) if plain else dout @ weight
        if ctx.needs_input_grad[1]:  # a sum over so many rows is quicker by MKL
            dweight = dout.mT @ x
        if ctx.needs_input_grad[2]:
            dbias = dout.sum(0)
        return dx, dweight, dbias
