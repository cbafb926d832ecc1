"""Decoding MEGABYTE one token after another, with everything computed so far kept.

A single token is so little work that the time goes into calling operators, not into what they
compute. So a block is written out here on plain tensors, with as few calls as possible: queries,
keys and values come from one matrix, the tables of positions are looked up, and views are made by
PyTorch itself, because a step would spend a tenth of its time in einops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

import hierkernels as hk
from python_models.layers import KVCache, RMSNorm
from python_models.rotary import apply_rotary

if TYPE_CHECKING:
    from python_models.megabyte import MEGABYTE


class Norm:
    """An RMSNorm as three calls: dividing the floor by the scale saves one."""

    def __init__(self, norm: RMSNorm) -> None:
        # rms(x) = |x| * scale
        self.gain = norm.g / norm.scale
        self.floor = norm.eps / norm.scale

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / length.clamp_min_(self.floor) * self.gain


class ShiftedNorm(Norm):
    """Token shift, then RMSNorm, of the positions that follow those of earlier calls.

    ``last`` is the delayed half of the newest position's channels, ``(B, C // 2)``; before the
    first position it is zero.
    """

    def __init__(self, norm: RMSNorm, batch: int) -> None:
        super().__init__(norm)
        channels = norm.g.shape[0]
        self.halves = (channels - channels // 2, channels // 2)
        self.zero = norm.g.new_zeros(batch, channels // 2)
        self.last = self.zero

    def __call__(self, x: Tensor) -> Tensor:
        kept, delayed = x.split_with_sizes(self.halves, -1)
        if x.ndim == 2:
            x = torch.cat((kept, self.last), -1)
            self.last = delayed
        else:
            shifted = torch.cat((self.last.unsqueeze(1), delayed[:, :-1]), 1)
            x = torch.cat((kept, shifted), -1)
            self.last = delayed[:, -1]
        return super().__call__(x)


class Block:
    """One block of a stage and what it remembers of the positions it has run."""

    def __init__(self, layer: nn.ModuleList, batch: int, capacity: int) -> None:
        attention, feed_forward = layer
        self.heads = attention.heads
        self.attention_input = ShiftedNorm(attention.norm, batch)
        self.to_qkv = torch.cat((attention.to_q.weight, attention.to_kv.weight))
        self.dim_head = self.to_qkv.shape[0] // (self.heads + 2)
        self.kv = KVCache(capacity)
        self.to_out = attention.to_out.weight
        norm, expand, _, _, contract = feed_forward
        self.feed_forward_input = ShiftedNorm(norm, batch)
        self.expand = (expand.weight, expand.bias)
        self.contract = (contract.weight, contract.bias)
        # Tensors: with a number, a product of so few elements takes twice as long.
        self.half, self.root_half = contract.weight.new_tensor((0.5, 0.5**0.5)).unbind()

    def restart(self) -> None:
        """Forgets every position; the buffers stay."""
        self.kv.length = 0
        self.attention_input.last = self.attention_input.zero
        self.feed_forward_input.last = self.feed_forward_input.zero

    def __call__(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Runs the next position ``x (B, C)``, or several, ``(B, N, C)``."""
        single = x.ndim == 2
        qkv = F.linear(self.attention_input(x), self.to_qkv)
        # (B, H + 2, N, D): the queries, the key and the value
        if single:
            qkv = qkv.view(-1, self.heads + 2, 1, self.dim_head)
        else:
            qkv = qkv.unflatten(2, (self.heads + 2, self.dim_head)).transpose(1, 2)
        if rotary is not None:
            qkv = apply_rotary(qkv, rotary)
        q, kv = qkv.split_with_sizes((self.heads, 2), 1)
        keys, values = self.kv.append(kv)
        out = hk.attention(q, keys, values, is_causal=True)
        out = out.flatten(1) if single else out.transpose(1, 2).flatten(2)
        x = F.linear(out, self.to_out) + x
        hidden = self._gelu(F.linear(self.feed_forward_input(x), *self.expand))
        return F.linear(hidden, *self.contract) + x

    def _gelu(self, x: Tensor) -> Tensor:
        """F.gelu; for one position its set-up in oneDNN takes longer than the four calls here."""
        if x.ndim > 2 or x.dtype not in (torch.float32, torch.float64):  # 1 + erf needs all digits
            return F.gelu(x)
        half = x * self.half
        return torch.addcmul(half, half, torch.erf(x * self.root_half))


def rotary_tables(transformer: nn.Module, positions: int) -> tuple[Tensor, Tensor] | None:
    """Tables ``(H + 2, positions, D)`` that turn queries and key, and the value by no angle."""
    if transformer.rotary_emb is None or not len(transformer.layers):
        return None
    heads = transformer.layers[0][0].heads
    cos, sin = (t.repeat(heads + 2, 1, 1) for t in transformer.rotary_emb(positions))
    cos[-1], sin[-1] = 1.0, 0.0
    return cos, sin


class Stage:
    """The sequence that stage ``s`` is in the middle of.

    ``row`` counts the sequences of the stage and ``length`` the positions run in this one; position
    0 is the start token, position ``n`` is patch ``n - 1``. ``output`` is what the newest position
    says: ``(B, N, C)`` for the N positions of the next stage, or ``(B, C)`` for the logits.
    """

    def __init__(self, model: MEGABYTE, s: int, batch: int) -> None:
        self.model = model
        self.s = s
        self.is_finest = s == model.stages - 1
        self.patch = model.patch_sizes[s]
        self.positions = model.max_seq_len[s]
        self.start = repeat(model.start_tokens[s], "c -> b c", b=batch)
        self.token_table = model.token_embs[0].weight
        self.has_positions = model.pos_embs is not None
        transformer = model.transformers[s]
        self.blocks = [Block(layer, batch, self.positions + 1) for layer in transformer.layers]
        self.norm = Norm(transformer.norm)
        self.rotary = rotary_tables(transformer, self.positions + 1)
        # The rows of the tables: a slice of each for every token adds up.
        self.rotary_rows = (
            None
            if self.rotary is None
            else list(zip(*(t.split(1, dim=1) for t in self.rotary), strict=True))
        )
        self.project = None if self.is_finest else model.to_next_transformer_projections[s]
        self.row = 0
        self.length = 0
        self.output: Tensor | None = None

    def read(self, ids: Tensor, context: Tensor | None) -> Tensor:
        """Runs the positions that ``ids (B, N)``, all tokens so far, make possible.

        ``context`` is the output of the stage above.
        """
        row, offset = divmod(ids.shape[1] - 1, self.patch * self.positions)
        if row != self.row:
            self.row, self.length = row, 0
            for block in self.blocks:
                block.restart()
        # The prediction of the next token sees the patches before the newest token's, and in the
        # finest stage, where a patch is a token, that token too.
        patches = offset // self.patch + self.is_finest
        if self.length <= patches:
            x = self._input(ids, context, patches)
            self._run(x, patches + 1)
        return self.output

    def _input(self, ids: Tensor, context: Tensor | None, patches: int) -> Tensor:
        first = max(self.length - 1, 0)
        if patches == first:
            return self.start
        origin = self.row * self.positions
        new = ids[:, (origin + first) * self.patch : (origin + patches) * self.patch]
        if self.is_finest:
            x = F.embedding(new, self.token_table)
        else:
            x = self.model.embed_patches(self.s, new)
        if self.has_positions:
            x = self.model.add_positions(self.s, x, first)
        if context is not None:
            x = x + context[:, first:patches]
        if not self.length:
            return torch.cat((self.start.unsqueeze(1), x), 1)
        return x.squeeze(1) if x.shape[1] == 1 else x

    def _run(self, x: Tensor, length: int) -> None:
        if self.rotary is None:
            rotary = None
        elif x.ndim == 2:
            rotary = self.rotary_rows[self.length]
        else:
            cos, sin = self.rotary
            rotary = cos[:, self.length : length], sin[:, self.length : length]
        for block in self.blocks:
            x = block(x, rotary)
        self.length = length
        x = self.norm(x if x.ndim == 2 else x[:, -1])
        self.output = x if self.project is None else self.project(x.unsqueeze(1))


class Decoder:
    """Evaluates a MEGABYTE on sequences that grow, without computing anything twice.

    A token costs one position of the finest stage and, at the end of a patch, one of each stage
    above. Dropout is off. The weights must not change meanwhile. Use it in torch.inference_mode or
    torch.no_grad: it writes into its buffers.
    """

    def __init__(self, model: MEGABYTE, batch: int) -> None:
        self.model = model
        capacity = model.max_seq_len[0] * model.patch_sizes[0]
        self.ids = torch.empty(
            batch, capacity, dtype=torch.long, device=model.to_logits.weight.device
        )
        self.length = 0
        self.to_logits = (model.to_logits.weight, model.to_logits.bias)
        self.stages = [Stage(model, s, batch) for s in range(model.stages)]

    def append(self, ids: Tensor) -> Tensor:
        """Adds tokens ``ids (B, N)``; returns the logits ``(B, V)`` of the token after them."""
        start, self.length = self.length, self.length + ids.shape[1]
        if self.length == 0:
            return self.model.forward_empty(ids.shape[0])[:, 0]
        self.ids.narrow(1, start, ids.shape[1]).copy_(ids)
        so_far = self.ids[:, : self.length]
        output = None
        for stage in self.stages:
            output = stage.read(so_far, output)
        return F.linear(output, *self.to_logits)
