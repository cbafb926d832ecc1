"""What a layer of native sparse attention keeps of the tokens it has read.

Shapes: B batch, H key/value heads, N tokens, W windows, D head channels, l tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


class _Buffer:
    """Memory for tokens, and how many of them have been written."""

    def __init__(self, memory: Tensor, used: int) -> None:
        self.memory = memory
        self.used = used


class Tokens:
    """Vectors ``(B, H, N, D)`` of a sequence that grows; never changes, :meth:`append` makes a new.

    Appending costs the new tokens alone: they are written behind the old ones into a buffer that
    both share. Only if another sequence has grown from the same tokens already, if the buffer is
    full, or if a gradient is wanted, everything is copied.
    """

    def __init__(self, values: Tensor, buffer: _Buffer | None = None) -> None:
        self.values = values
        self._buffer = buffer

    def __len__(self) -> int:
        return self.values.shape[2]

    def append(self, new: Tensor) -> Tokens:
        """These tokens and then ``new (B, H, N', D)``."""
        if new.shape[2] == 0:
            return self
        if len(self) == 0:
            return Tokens(new)
        if torch.is_grad_enabled() and (new.requires_grad or self.values.requires_grad):
            return Tokens(torch.cat((self.values, new), dim=2))
        old, total = len(self), len(self) + new.shape[2]
        buffer = self._buffer
        if buffer is None or buffer.used != old or buffer.memory.shape[2] < total:
            shape = (*new.shape[:2], max(2 * old, total, 64), new.shape[3])
            buffer = _Buffer(new.new_empty(shape), total)
            buffer.memory[:, :, :old] = self.values
        buffer.memory[:, :, old:total] = new
        buffer.used = total
        return Tokens(buffer.memory[:, :, :total], buffer)


@dataclass(frozen=True)
class LayerCache:
    """The state of one layer after ``length`` tokens.

    keys, values: rotated, of the tokens, for the selected blocks and the sliding window.
    window_keys, window_values: those of the sliding window where it has its own, else None.
    compressed_keys, compressed_values: the memory tokens and then one for each whole window.
    pending_keys, pending_values: ``(B, H, fewer than l, D)``, not rotated: the tokens from which
        the next window begins (zeros before the first token, where windows begin there).
    """

    length: int
    keys: Tokens
    values: Tokens
    compressed_keys: Tokens
    compressed_values: Tokens
    pending_keys: Tensor
    pending_values: Tensor
    window_keys: Tokens | None = None
    window_values: Tokens | None = None

    def select(self, rows: Tensor) -> LayerCache:
        """The cache of some of the batch's sequences, ``rows (B')`` int64, as beam search needs."""
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tokens):
                value = Tokens(value.values.index_select(0, rows))
            elif isinstance(value, Tensor):
                value = value.index_select(0, rows)
            chosen[field.name] = value
        return LayerCache(**chosen)


@dataclass(frozen=True)
class DenseCache:
    """The state of a layer of dense attention: rotated keys, and values."""

    length: int
    keys: Tokens
    values: Tokens
