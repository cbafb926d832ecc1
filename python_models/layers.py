"""Pieces that several models share: norms, token shift, rotary positions, caches, sampling filters.

Shapes: B batch, H heads, N tokens, D head channels, C model channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scales every token to unit root mean square: ``x / max(rms(x), eps) * g``.

    ``(..., C) -> (..., C)``. Unlike ``F.rms_norm`` the small number is a floor and not an addend,
    so an ordinary token is normalised exactly (Zhang and Sennrich, 2019, equation 4).
    """

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.eps = eps
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.scale
        return x / rms.clamp(min=self.eps) * self.g


class FeedForward(nn.Sequential):
    """Norm, expansion by ``mult``, GELU, dropout, contraction: ``(..., C) -> (..., C)``."""

    def __init__(self, *, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__(
            RMSNorm(dim),
            nn.Linear(dim, dim * mult),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(dim * mult, dim),
        )


class RotaryEmbedding(nn.Module):
    """Rotary positions, half-split layout (Su et al., 2021, section 3.2).

    Channel ``c`` and channel ``c + D/2`` form a pair that is turned by ``position * theta**(-2c/D)``.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", theta ** -(torch.arange(0, dim, 2).float() / dim))

    def forward(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions ``start <= n < stop``, each ``(stop - start, D)``."""
        positions = torch.arange(start, stop, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(positions, self.inv_freq).repeat(1, 2)
        return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns ``x`` (..., N, D) by its positions; keeps its dtype under autocast."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class ShiftCache:
    """The delayed channels of the newest token, ``(B, 1, C // 2)``; None before the first token."""

    last: Tensor | None = None


def token_shift(x: Tensor, cache: ShiftCache | None = None) -> Tensor:
    """Delays the second half of the channels by one position: ``(B, N, C) -> (B, N, C)``.

    The first token's delayed half is zero, or, when a cache that has seen earlier tokens is given,
    the half that the newest of those tokens left behind. The cache then takes this call's last.
    """
    kept, delayed = x.chunk(2, dim=-1)
    if cache is None or cache.last is None:
        shifted = F.pad(delayed, (0, 0, 1, -1))
    elif x.shape[-2] == 1:
        shifted = cache.last
    else:
        shifted = torch.cat((cache.last, delayed[:, :-1]), dim=-2)
    if cache is not None:
        cache.last = delayed[:, -1:]
    return torch.cat((kept, shifted), dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far, in buffers that are allocated once.

    The buffers take the dtype of the first keys, which autocast may have lowered.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores ``k, v`` (B, H, N, D) and returns views of everything stored, oldest first."""
        if self._buffers is None:
            b, h, _, d = k.shape
            self._buffers = (
                k.new_empty(b, h, self.capacity, d),
                v.new_empty(b, h, self.capacity, v.shape[-1]),
            )
        start, stop = self.length, self.length + k.shape[-2]
        self.length = stop
        keys, values = self._buffers
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        return keys[:, :, :stop], values[:, :, :stop]


def keep_top(logits: Tensor, thres: float) -> Tensor:
    """Keeps the best ``(1 - thres)`` share of the last dimension, at least one; the rest -inf."""
    count = max(int((1 - thres) * logits.shape[-1]), 1)
    values, indices = logits.topk(count, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter_(-1, indices, values)


def sample_logits(
    logits: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from softmax(logits / temperature) over the last dimension: ``(..., V) -> (...)``.

    Gumbel-max: the largest of the logits plus Gumbel noise is such a draw. Temperature 0 is its
    limit, the most likely token, and uses no random number.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    tiny = 1e-20
    uniform = torch.empty_like(logits).uniform_(0, 1, generator=generator)
    gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
    return (logits / temperature + gumbel).argmax(dim=-1)
