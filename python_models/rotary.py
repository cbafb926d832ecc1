"""Rotary positions: tables, turning, and a projection to turned queries and keys.

Shapes: B batch, H heads, N tokens, D head channels, C model channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hierkernels.products import linear


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

    def phases(self, length: int, ahead: int) -> tuple[Tensor, Tensor]:
        """Complex tables for :func:`project_turned` of queries and of keys, ``(length, D / 2)``.

        The queries stand so many positions ahead of their own keys.
        """
        total = length + ahead
        angles, decay = self.angles(total), self.decay(total)
        if angles.dtype in (torch.float16, torch.bfloat16):  # there is no complex number of them
            angles, decay = angles.float(), None if decay is None else decay.float()
        if decay is None:
            turns = torch.polar(torch.ones_like(angles), angles)
            return turns[ahead:], turns[:length]
        return torch.polar(decay, angles)[ahead:], torch.polar(1 / decay, angles)[:length]

    def turn(self, q: Tensor, k: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """q, k ``(..., N, D)``, the last query at the last key's position plus ``ahead``."""
        n = k.shape[-2]
        (q_cos, q_sin), (k_cos, k_sin) = self.tables(n + ahead)
        last = slice(n + ahead - q.shape[-2], None)
        return apply_rotary(q, (q_cos[last], q_sin[last])), apply_rotary(k, (k_cos[:n], k_sin[:n]))


def project_turned(
    x: Tensor, to_qkv: nn.Linear, heads: int, phases: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x (B, N, C)``, ``(B, H, N, D)`` each, q and k turned.

    Equal to the layer followed by :func:`apply_rotary`, but for the order of the channels of q and
    k, which no product of a query and a key depends on: the two of a pair stand side by side, so
    that turning is one complex product, several times as fast.

    Args:
        to_qkv: the layer, without bias, whose outputs are q, k and v, each of all heads.
        phases: complex, ``(N, D / 2)``, of queries and of keys.
    """
    turned, inner = 2 * to_qkv.out_features // 3, to_qkv.out_features // 3
    halves = to_qkv.weight[:turned].view(2 * heads, 2, -1, to_qkv.in_features)
    pairs = halves.transpose(1, 2).reshape(turned, to_qkv.in_features)
    qk, v = linear(x, torch.cat((pairs, to_qkv.weight[turned:]))).split((turned, inner), dim=-1)
    dtype = qk.dtype
    qk = qk.unflatten(-1, (2, heads, inner // heads // 2, 2))
    table = torch.stack(phases, dim=1).unsqueeze(2)  # (N, 2, 1, D / 2)
    qk = torch.view_as_complex(qk.to(table.real.dtype)) * table
    q, k = torch.view_as_real(qk).flatten(-2).to(dtype).permute(2, 0, 3, 1, 4)
    return q, k, v.unflatten(-1, (heads, -1)).transpose(1, 2)
