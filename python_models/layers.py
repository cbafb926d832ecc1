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

    Channels ``c`` and ``c + D/2`` form a pair, turned by ``position * theta**(-2c/D)``.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables for :func:`apply_rotary` of positions 0 to length - 1, each ``(length, D)``."""
        positions = torch.arange(length, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(positions, self.inv_freq)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns ``x`` (..., N, D) by its positions; keeps its dtype under autocast.

    A roll by half the channels brings each channel to its partner; the sign of the rotation is in
    the table of sines.
    """
    cos, sin = rotary
    turned = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


def token_shift(x: Tensor) -> Tensor:
    """Delays the second half of the channels by one position, zero first: ``(B, N, C)``."""
    kept, delayed = x.chunk(2, dim=-1)
    return torch.cat((kept, F.pad(delayed, (0, 0, 1, -1))), dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far, in one buffer that is allocated once.

    The buffer takes batch, heads, channels and dtype (which autocast may have lowered) from the
    first keys it is given. ``length`` counts the tokens; setting it to 0 forgets them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffer: Tensor | None = None
        # Views by first and last token: after a restart they are needed again.
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def append(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Stores ``kv (B, 2 H, N, D)``, the keys of all heads and then the values.

        Returns all keys and all values, each ``(B, H, length, D)``.
        """
        start = self.length
        self.length += kv.shape[2]
        views = self._views.get((start, self.length))
        if views is None:
            views = self._views[start, self.length] = self._make_views(kv, start)
        new, keys, values = views
        new.copy_(kv)
        return keys, values

    def _make_views(self, kv: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._buffer is None:
            batch, both, _, channels = kv.shape
            self._buffer = kv.new_empty(batch, both, self.capacity, channels)
        keys, values = self._buffer[:, :, : self.length].chunk(2, dim=1)
        return self._buffer[:, :, start : self.length], keys, values


def keep_top(logits: Tensor, thres: float) -> Tensor:
    """Keeps the best ``(1 - thres)`` share of the last dimension, at least one; the rest -inf."""
    count = max(int((1 - thres) * logits.shape[-1]), 1)
    values, indices = logits.topk(count, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter_(-1, indices, values)


def gumbel_sample(
    logits: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from softmax(logits / temperature) over the last dimension: ``(..., V) -> (...)``.

    The index of the largest of the logits plus Gumbel noise is such a draw (Gumbel, 1954).
    """
    tiny = 1e-20
    uniform = torch.empty_like(logits).uniform_(0, 1, generator=generator)
    gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
    return (logits / temperature + gumbel).argmax(dim=-1)
