"""Rotary positions: tables, turning, and a projection to turned queries and keys.

Shapes: B batch, H heads, N tokens, D head channels, C model channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hierkernels as hk
from hierkernels.products import linear

Tables = tuple[Tensor, Tensor]  # of cosines and of sines


class RotaryEmbedding(nn.Module):
    """Rotary positions, half-split layout (Su et al., 2021, section 3.2).

    Channels ``c`` and ``c + D/2`` form a pair, turned by ``position * theta**(-2c/D)``.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim))

    def angles(self, length: int) -> Tensor:
        """Angles of positions 0 to length - 1, ``(length, D / 2)``."""
        positions = torch.arange(length, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        return torch.outer(positions, self.inv_freq)

    def tables_of_pairs(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for hk.rotary, positions from 0 on, each ``(length, D / 2)``."""
        angles = self.angles(length)
        return angles.cos(), angles.sin()

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables for :func:`apply_rotary` of positions 0 to length - 1, each ``(length, D)``."""
        angles = self.angles(length)
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


class LocalRotaryEmbedding(RotaryEmbedding):
    """Rotary positions of windowed attention, with xpos if ``scale_base`` is given.

    xpos (Sun et al., 2022, section 3.1) multiplies query i and key j by ``s**(i / scale_base)`` and
    ``s**(-j / scale_base)``, s below 1 and by channel, so that distant pairs weigh less.
    """

    scale: Tensor

    def __init__(self, dim: int, scale_base: float | None = None) -> None:
        super().__init__(dim)
        self.scale_base = scale_base
        scale = (torch.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)

    def decay(self, length: int) -> Tensor | None:
        """Factors of queries at positions 0 to length - 1, ``(length, D / 2)``, 1 in the middle."""
        if self.scale_base is None:
            return None
        positions = torch.arange(length, device=self.scale.device, dtype=self.scale.dtype)
        return self.scale ** ((positions - length // 2) / self.scale_base)[:, None]

    def tables(self, length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Tables for :func:`apply_rotary` of positions 0 to length - 1, of queries and of keys."""
        cos, sin = self(length)
        decay = self.decay(length)
        if decay is None:
            return (cos, sin), (cos, sin)
        decay = torch.cat((decay, decay), dim=-1)
        return (cos * decay, sin * decay), (cos / decay, sin / decay)

    def turning_tables(self, length: int, ahead: int) -> tuple[Tables, Tables]:
        """Tables for :func:`project_turned`, of queries and of keys, each ``(length, D / 2)``.

        The queries stand so many positions ahead of their own keys.
        """
        total = length + ahead
        (cos, sin), decay = self.tables_of_pairs(total), self.decay(total)
        if decay is None:
            return (cos[ahead:], sin[ahead:]), (cos[:length], sin[:length])
        queries = tuple((t * decay)[ahead:] for t in (cos, sin))
        return queries, tuple((t / decay)[:length] for t in (cos, sin))

    def turn(self, q: Tensor, k: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """q, k ``(..., N, D)``, the last query at the last key's position plus ``ahead``."""
        n = k.shape[-2]
        (q_cos, q_sin), (k_cos, k_sin) = self.tables(n + ahead)
        last = slice(n + ahead - q.shape[-2], None)
        return apply_rotary(q, (q_cos[last], q_sin[last])), apply_rotary(k, (k_cos[:n], k_sin[:n]))


def project_turned(
    x: Tensor, to_qkv: nn.Linear, heads: int, tables: tuple[Tables, Tables]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x (B, N, C)``, ``(B, H, N, D)`` each, q and k turned.

    Equal to the layer followed by :func:`apply_rotary`. A product for each of the three needs no
    gradient put together of theirs.

    Args:
        to_qkv: the layer, without bias, whose outputs are q, k and v, each of all heads.
        tables: of queries and of keys, see :meth:`LocalRotaryEmbedding.turning_tables`.
    """
    q, k, v = (
        linear(x, weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        for weight in to_qkv.weight.chunk(3)
    )
    return hk.rotary(q, *tables[0]), hk.rotary(k, *tables[1]), v
