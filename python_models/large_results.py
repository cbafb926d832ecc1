"""Linear layers, splits and sums whose large results are new memory as rarely as possible.

On CPUs memory that comes fresh from the system costs more than what these operations do with it:
above 32 MiB, PyTorch's results are such memory in every step. Results are those of PyTorch's own
operations. Compilers and autocast get those themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hierkernels.memory import large_empty


def _is_watched(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        out = large_empty(x, (*x.shape[:-1], weight.shape[0]))
        torch.mm(x.flatten(0, -2), weight.T, out=out.view(-1, weight.shape[0]))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        weight_grad = rows.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad
        if torch.is_grad_enabled():  # gradients of gradients
            return grad @ weight, weight_grad
        x_grad = large_empty(grad, x.shape)
        torch.mm(rows, weight, out=x_grad.view(-1, weight.shape[1]))
        return x_grad, weight_grad


class LargeLinear(nn.Linear):
    """nn.Linear without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if _is_watched(x) or x.dtype != self.weight.dtype or x.ndim < 2 or not x.numel():
            return F.linear(x, self.weight)
        return _Linear.apply(x, self.weight)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return x.split(sizes, dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # gradients of gradients
            return torch.cat(grads, dim=-1), None
        return torch.cat(grads, dim=-1, out=large_empty(grads[0], ctx.shape)), None


def split_channels(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """``x.split(sizes, dim=-1)``."""
    return x.split(sizes, dim=-1) if _is_watched(x) else _Split.apply(x, sizes)
