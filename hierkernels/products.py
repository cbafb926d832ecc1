"""Products with a weight, by the quickest there is.

On CPUs in float32, F.linear asks MKL, which is slow on processors that it was not made for; oneDNN,
which PyTorch uses for bfloat16, is up to 1.7 times as fast there, and no slower elsewhere. The
compiled core has products for processors with AVX-512 and its bfloat16, but no AMX: they are ahead
of both, most of all for gradients of weights, and round float32 operands on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hierkernels import dispatch
from hierkernels.eager import direct_apply, is_unwatched
from hierkernels.native import native

# From so many rows on, copying the weight to panels is little of a product's time.
_ROWS = 256


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """F.linear, plus ``residual (..., N)``; its errors, its results.

    ``x (..., K), weight (N, K), bias (N)`` to ``(..., N)``. Under autocast to bfloat16, x and a
    float32 weight may be rounded on the way, what is added to a float32 residual is not, and
    gradients are rounded once, to the type that they are returned in. Within
    hk.use_backend("reference") it is F.linear itself.
    """
    if not _is_plain(x, weight, bias, residual):
        return _sum(F.linear(x, weight, bias), residual)
    rows = x.numel() // x.shape[-1]
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    # Without autocast, x in bfloat16 does not fit the weight.
    if rows >= _ROWS and dtype == (torch.bfloat16 if autocast else torch.float32) and _has_core():
        if residual is None or _can_add(residual, x, weight, dtype):
            return _core_linear(x, weight, bias, residual, dtype)
        return _core_linear(x, weight, bias, None, dtype) + residual
    if dtype == x.dtype == torch.float32 and rows > 1 and _has_onednn():
        out = _onednn_linear(x.reshape(rows, x.shape[-1]), weight, bias)
        return _sum(out.view(*x.shape[:-1], weight.shape[0]), residual)
    return _sum(F.linear(x, weight, bias), residual)


def _sum(out: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return out if residual is None else out + residual


def _can_add(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether the product of that dtype can begin with the residual."""
    return residual.dtype in (dtype, torch.float32) and residual.shape == (
        *x.shape[:-1],
        weight.shape[0],
    )


def _is_plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> bool:
    """Tensors on a CPU of shapes that fit, the weight in float32, that nothing watches."""
    return (
        weight.dtype == torch.float32
        and x.dtype in (torch.float32, torch.bfloat16)
        and (bias is None or bias.dtype == torch.float32)
        and all([t is None or t.is_cpu for t in (x, weight, bias, residual)])
        and x.ndim > 1
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() > 0
        and weight.numel() > 0
        and dispatch.requested_backend(None) != "reference"
        and is_unwatched((x, weight, bias, residual))
    )


def _has_core() -> bool:
    """Whether the core's products are the quickest."""
    return native() is not None and native().cpu_isa() == "avx512bf16"


def _has_onednn() -> bool:
    return _HAS_ONEDNN and bool(torch.backends.mkldnn.enabled)


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


_onednn_linear = direct_apply(_Linear)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _core_product(
    a: torch.Tensor,
    b: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    row_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """``a (M, K) @ b (K, N) + bias (N) + addend``, multiplied in dtype, to out (..., N); out.

    out has M rows, addend its shape and type. The sums of a's rows go to row_sums (M), float32.
    """
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    if addend is not None:
        addend = addend.reshape(a.shape[0], -1).contiguous()
    target = out.view(a.shape[0], -1)
    native().product(a, b, bias, addend, dtype == torch.bfloat16, target, row_sums)
    return out


class _CoreLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        if bias is not None:
            bias = bias.contiguous()
        kept = dtype if residual is None else residual.dtype
        out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=kept)
        return _core_product(_rows(x), weight.mT, dtype, out, bias=bias, addend=residual)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        dresidual = dout if ctx.needs_input_grad[3] else None
        rows, drows = _rows(x), _rows(dout)
        if torch.is_grad_enabled() or not is_unwatched((dout, x, weight)):
            # With create_graph the gradients need a graph.
            to = ctx.dtype
            dx = (dout.to(to) @ weight.to(to)).to(x.dtype)
            dweight = (drows.mT.to(to) @ rows.to(to)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                dbias = drows.sum(0, dtype=weight.dtype)
            return dx, dweight, dbias, dresidual, None
        if ctx.needs_input_grad[0]:
            dx = torch.empty(x.shape, dtype=x.dtype)
            _core_product(drows, weight, ctx.dtype, dx)
        if ctx.needs_input_grad[2]:
            dbias = torch.empty(weight.shape[:1], dtype=weight.dtype)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty(weight.shape, dtype=weight.dtype)
            _core_product(drows.mT, rows, ctx.dtype, dweight, row_sums=dbias)
        elif dbias is not None:
            torch.sum(drows, 0, dtype=dbias.dtype, out=dbias)
        return dx, dweight, dbias, dresidual, None


_core_linear = direct_apply(_CoreLinear)
