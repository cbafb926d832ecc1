"""Decoding gMLPGPT one token after another, with everything computed so far kept.

A gating unit needs the normalised gates of the tokens before: a new token is one row of the mixing
matrix times them, O(N) for each channel, or O(w) with a window. The attention head needs keys and
values, the convolution of a folded layer its newest inputs. A prompt is read at once, by the same
operators as in training.

Shapes: B batch, N tokens, C channels, F hidden channels, H heads of a gating unit, D = F / 2 / H
channels of each, A channels of the attention head, w window, e classes of a folded layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import hierkernels as hk

if TYPE_CHECKING:
    from python_models.gmlp_gpt import gMLPBlock, gMLPGPT
    from python_models.layers import PreNorm


class Rows:
    """What a layer keeps of each of its tokens, for the tokens that later ones can see.

    Without a window: all of them, token ``i`` in row ``i``. With one: 2 w rows, the window before
    the newest token's and that one, as the columns of its mixing weights. Rows that stand for
    tokens before the first one are zero.
    """

    def __init__(self, example: Tensor, dim: int, *, window: int | None, capacity: int) -> None:
        """Rows lie along ``dim``; the rest of the shape and the dtype are those of example."""
        shape = list(example.shape)
        shape[dim] = capacity if window is None else 2 * window
        self.buffer = example.new_zeros(shape)
        self.dim = dim
        self.window = window
        self.length = 0

    @property
    def next(self) -> int:
        """Row of the next token."""
        return self.length if self.window is None else self.window + self.length % self.window

    def fill(self, rows: Tensor) -> None:
        """Takes all the tokens of a prompt."""
        n = self.length = rows.shape[self.dim]
        if n == 0:
            return
        last = n
        if self.window is not None:
            # From the window before that of the newest token on.
            window, at = divmod(n - 1, self.window)
            first = max((window - 1) * self.window, 0)
            rows = rows.narrow(self.dim, first, n - first)
            last = self.window + at + 1
        count = rows.shape[self.dim]
        self.buffer.narrow(self.dim, last - count, count).copy_(rows)

    def append(self, row: Tensor) -> Tensor:
        """Takes one token; returns the rows up to its own, a view that the next call may change."""
        w, at = self.window, self.length
        if w is not None:
            if at and at % w == 0:  # the token begins a window
                self.buffer.narrow(self.dim, 0, w).copy_(self.buffer.narrow(self.dim, w, w))
            at = w + at % w
        self.buffer.narrow(self.dim, at, 1).copy_(row)
        self.length += 1
        return self.buffer.narrow(self.dim, 0, at + 1)


class BlockCache:
    """One sequence through a gMLPBlock: a residue class of a folded layer, or all tokens."""

    def __init__(self, block: gMLPBlock, capacity: int) -> None:
        self.block = block
        self.capacity = capacity
        self.gates: Rows | None = None  # (H, rows, B * D)
        self.kv: Rows | None = None  # (2, B, 1, rows, A)

    def _rows(self, example: Tensor, dim: int) -> Rows:
        return Rows(example, dim, window=self.block.sgu.window, capacity=self.capacity)

    def read(self, gate: Tensor, kv: Tensor | None) -> None:
        """Keeps what the block computed of a prompt: ``(B, N, F / 2)`` and ``(2, B, 1, N, A)``."""
        gates = rearrange(gate, "b n (h d) -> h n (b d)", h=self.block.sgu.heads)
        self.gates = self._rows(gates, 1)
        self.gates.fill(gates)
        if kv is not None:
            self.kv = self._rows(kv, 3)
            self.kv.fill(kv)

    def step(self, x: Tensor) -> Tensor:
        """Runs the next token: ``(B, 1, C) -> (B, 1, C)``."""
        block = self.block
        gate_residual = None if block.attn is None else self._attend(x)
        residual, gate = block.sgu.normalized(block.proj_in(x))
        gate = self._mix(gate)
        if gate_residual is not None:
            gate = gate + gate_residual
        return block.proj_out(block.sgu.act(gate) * residual)

    def _mix(self, gate: Tensor) -> Tensor:
        """One row of the mixing matrices times the gates: ``(B, 1, F / 2) -> (B, 1, F / 2)``."""
        sgu, batch = self.block.sgu, gate.shape[0]
        row = gate.view(batch, sgu.heads, -1).transpose(0, 1).reshape(sgu.heads, 1, -1)
        if self.gates is None:
            self.gates = self._rows(row, 1)
        at = self.gates.length if sgu.window is None else self.gates.length % sgu.window
        gates = self.gates.append(row)  # (H, rows, B * D)
        weight = sgu.weight[:, at : at + 1, : gates.shape[1]]
        mixed = torch.baddbmm(sgu.bias[:, at, None, None], weight, gates)  # (H, 1, B * D)
        return mixed.view(sgu.heads, batch, -1).transpose(0, 1).reshape(batch, 1, -1)

    def _attend(self, x: Tensor) -> Tensor:
        attention = self.block.attn
        q, k, v = attention.project(x)
        row = torch.stack((k, v))
        if self.kv is None:
            self.kv = self._rows(row, 3)
        in_first_window = attention.window is not None and self.kv.length < attention.window
        kv = self.kv.append(row)
        if in_first_window and not attention.upstream_quirks:
            kv = kv[:, :, :, attention.window :]  # there is no window before
        out = hk.attention(q, kv[0], kv[1])
        return attention.to_out(out.flatten(2))


class LayerCache:
    """One layer: norm, the block of each residue class of positions, and the convolution."""

    def __init__(self, layer: PreNorm, seq_len: int) -> None:
        self.norm = layer.norm
        fold = layer.fn
        self.block: gMLPBlock = fold.fn
        self.every = fold.every
        self.classes = [
            BlockCache(self.block, -(-seq_len // self.every)) for _ in range(fold.every)
        ]
        self.length = 0
        self.conv = fold.conv
        self.newest: Tensor | None = None  # (B, e - 1, C): inputs of the convolution

    def read(self, x: Tensor) -> Tensor:
        """Runs a prompt from its first token on: ``(B, N, C) -> (B, N, C)``."""
        block, e = self.block, self.every
        self.length = n = x.shape[1]
        x = rearrange(F.pad(self.norm(x), (0, 0, 0, -n % e)), "b (n e) c -> e b n c", e=e)
        flat = x.flatten(0, 1)
        gate_residual, kv = None, None
        if block.attn is not None:
            q, k, v = block.attn.project(flat)
            gate_residual = block.attn.attend(q, k, v)
            kv = rearrange(torch.stack((k, v)), "kv (e b) 1 n a -> e kv b 1 n a", e=e)
        residual, gate = block.sgu.normalized(block.proj_in(flat))
        y = block.proj_out(block.sgu.mix(residual, gate, gate_residual))
        gate = rearrange(gate, "(e b) n f -> e b n f", e=e)
        for c, cache in enumerate(self.classes):
            tokens = (n - c + e - 1) // e  # the rest is padding
            cache.read(gate[c, :, :tokens], None if kv is None else kv[c, :, :, :, :tokens])
        y = rearrange(y, "(e b) n c -> b (n e) c", e=e)[:, :n]
        if self.conv is None:
            return y
        y = F.pad(y, (0, 0, e - 1, 0))
        self.newest = y[:, n:]
        return rearrange(self.conv(rearrange(y, "b n c -> b c n")), "b c n -> b n c")

    def step(self, x: Tensor) -> Tensor:
        """Runs the next token: ``(B, 1, C) -> (B, 1, C)``."""
        y = self.classes[self.length % self.every].step(self.norm(x))
        self.length += 1
        if self.conv is None:
            return y
        y = torch.cat((self.newest, y), dim=1)  # (B, e, C)
        self.newest = y[:, 1:]
        return (y * self.conv.weight[:, 0].T).sum(1, keepdim=True) + self.conv.bias


class Decoder:
    """Evaluates a gMLPGPT on sequences that grow to at most seq_len tokens.

    Nothing is computed twice. No layer is left out. The weights must not change meanwhile.
    """

    def __init__(self, model: gMLPGPT) -> None:
        self.model = model
        self.length = 0
        if model.reversible:
            parts = [(block.f.net, block.g.net) for block in model.net.blocks]
        else:
            parts = [(layer, None) for (layer,) in model.net.layers]
        self.layers = [(LayerCache(gmlp, model.seq_len), ff) for gmlp, ff in parts]

    def append(self, ids: Tensor) -> Tensor:
        """Adds tokens ``ids (B, N)``; returns the logits ``(B, V)`` of the token after them.

        Raises:
            ValueError: no tokens, or more than seq_len in all.
        """
        n = ids.shape[1]
        if n == 0 or self.length + n > self.model.seq_len:
            raise ValueError(
                f"ids must have 1 to {self.model.seq_len - self.length} tokens a sequence, up to "
                f"seq_len = {self.model.seq_len} in all, got {n}"
            )
        pieces = [ids] if self.length == 0 else ids.split(1, dim=1)
        for piece in pieces:
            x = self._run(self.model.to_embed(piece.long()))
        return self.model.to_logits(x[:, -1])

    def _run(self, x: Tensor) -> Tensor:
        is_prompt = self.length == 0
        self.length += x.shape[1]
        x1 = x2 = x
        for gmlp, feed_forward in self.layers:
            y = gmlp.read(x2) if is_prompt else gmlp.step(x2)
            if feed_forward is None:
                x2 = x2 + y
            else:
                x1 = x1 + y
                x2 = x2 + feed_forward(x1)
        return x2 if not self.model.reversible else x1 + x2
