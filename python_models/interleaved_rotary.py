"""Rotary positions whose pairs are neighbouring channels, as in the package rotary-embedding-torch.

Shapes: N tokens, D head channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Turn(torch.autograd.Function):
    """x times a complex number for each pair of neighbouring channels.

    PyTorch's own derivative of a complex product takes ten times as long as the product.
    """

    @staticmethod
    def forward(x: Tensor, turn: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _Turn.apply(_readable_as_complex(grad), turn.conj_physical()), None


def _readable_as_complex(x: Tensor) -> Tensor:
    """x, copied if its strides do not let pairs of channels be read as complex numbers."""
    *strides, last = x.stride()
    fits = last == 1 and all(s % 2 == 0 for s in strides) and x.storage_offset() % 2 == 0
    return x if fits else x.contiguous()


class InterleavedRotaryEmbedding(nn.Module):
    """Turns channels ``2c`` and ``2c + 1`` by ``position * theta**(-2c/D)`` (Su et al., 2021).

    ``freqs`` is a parameter that is not trained, so that state dicts have it.
    """

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        freqs = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, first: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(length, D / 2)`` of the positions first, first + 1, ..."""
        freqs = self.freqs
        if freqs.dtype in (torch.float16, torch.bfloat16):  # which cannot count far
            freqs = freqs.float()
        positions = torch.arange(first, first + length, device=freqs.device, dtype=freqs.dtype)
        angles = torch.outer(positions, freqs)
        return angles.cos(), angles.sin()


def apply_interleaved_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns ``x (..., N, D)`` by its positions; keeps its dtype."""
    cos, sin = rotary
    if x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _Turn.apply(_readable_as_complex(x), torch.complex(cos, sin))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
