"""Decoding HierarchicalTransformer one token after another, with everything computed so far kept.

A new token of the sequence is one new token in each hierarchy whose stride divides its place. That
one needs the embeddings that it compresses and, in each layer, the previous token of its residue
class (for the token shift) and the keys and values of its class. The other hierarchies take part
in merging with their newest tokens. A prompt is read at once, by the same functions.

Shapes: B batch, M tokens of a hierarchy, M' of a residue class, C channels, H heads, D head
channels, a residue classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import hierkernels as hk
from python_models.layers import LocalMHA, token_shift
from python_models.rotary import apply_rotary

if TYPE_CHECKING:
    from python_models.hierarchical_layers import Compress, HierarchicalBlock
    from python_models.hierarchical_transformer import HierarchicalTransformer


class Shift:
    """Token shift of the rows that follow those of earlier calls."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.delayed: list[Tensor | int] = [0] * classes  # (B, C // 2) of each class

    def read(self, x: Tensor) -> Tensor:
        """All rows of a prompt, ``(B, M, C) -> (B, M, C)``."""
        delayed = x.chunk(2, dim=-1)[1]
        for row in range(max(x.shape[1] - self.classes, 0), x.shape[1]):
            self.delayed[row % self.classes] = delayed[:, row]
        return token_shift(x, self.classes)

    def step(self, x: Tensor, at: int) -> Tensor:
        """Row ``at``, ``(B, C) -> (B, C)``."""
        kept, delayed = x.chunk(2, dim=-1)
        previous = self.delayed[at % self.classes]
        self.delayed[at % self.classes] = delayed
        if not isinstance(previous, Tensor):
            previous = torch.zeros_like(delayed)
        return torch.cat((kept, previous), dim=-1)


class AttentionCache:
    """Keys and values of an attention layer, turned by their positions, by residue class."""

    def __init__(self, block: HierarchicalBlock, capacity: int) -> None:
        """``capacity`` is the largest number of tokens of a class."""
        self.attn = block.attn
        self.classes = block.classes
        self.capacity = capacity
        self.heads = self.attn.heads
        self.dim_head = self.attn.to_out.in_features // self.heads
        is_local = isinstance(self.attn, LocalMHA)
        self.window: int | None = self.attn.attn_fn.window_size if is_local else None
        rotary = self.attn.attn_fn.rel_pos if is_local else self.attn.rotary_emb
        # (3, 1, capacity, D): for queries, for keys, and for values, which are not turned.
        queries, keys = rotary.tables(capacity)
        self.cos, self.sin = (
            torch.stack((q, k, torch.full_like(q, still))).unsqueeze(1)
            for q, k, still in zip(queries, keys, (1.0, 0.0), strict=True)
        )
        self.kv: Tensor | None = None  # (a, 2, B, H, capacity, D)

    def _project(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Queries ``(B, H, M', D)`` and keys and values ``(2, B, H, M', D)`` from ``(B, M', C)``.

        ``first`` is the position of the first token in its class.
        """
        rows = slice(first, first + x.shape[1])
        qkv = self.attn.to_qkv(self.attn.norm(x))
        qkv = qkv.view(*x.shape[:2], 3, self.heads, self.dim_head).permute(0, 2, 3, 1, 4)
        qkv = apply_rotary(qkv, (self.cos[:, :, rows], self.sin[:, :, rows])).transpose(0, 1)
        return qkv[0], qkv[1:]

    def read(self, x: Tensor) -> Tensor:
        """All tokens of a prompt, folded: ``(B * a, M', C) -> (B * a, M', C)``."""
        q, kv = self._project(x, 0)
        by_class = rearrange(kv, "kv (b a) h m d -> a kv b h m d", a=self.classes)
        self._allocate(by_class)
        # A class may have a token less; its row is written again before it is read.
        self.kv[:, :, :, :, : x.shape[1]] = by_class
        if self.window is None:
            out = hk.attention(q, kv[0], kv[1], is_causal=True)
        else:
            out = hk.local_attention(q, kv[0], kv[1], self.window, exact_window=True)
        return self.attn.to_out(rearrange(out, "b h m d -> b m (h d)"))

    def step(self, x: Tensor, at: int) -> Tensor:
        """Row ``at`` of the hierarchy, ``(B, C) -> (B, C)``."""
        position, kind = divmod(at, self.classes)
        q, kv = self._project(x[:, None], position)
        self._allocate(kv[None])
        self.kv[kind, :, :, :, position] = kv[:, :, :, 0]
        first = 0 if self.window is None else max(position - self.window, 0)
        keys, values = self.kv[kind, :, :, :, first : position + 1].unbind()
        return self.attn.to_out(hk.attention(q, keys, values).flatten(1))

    def _allocate(self, kv: Tensor) -> None:
        if self.kv is None:  # batch and dtype, which autocast may have lowered, are known now
            _, _, batch, heads, _, channels = kv.shape
            self.kv = kv.new_empty(self.classes, 2, batch, heads, self.capacity, channels)


class BlockCache:
    """One layer of a hierarchy and what it remembers; ``newest (B, C)`` is its latest result."""

    def __init__(self, block: HierarchicalBlock, length: int) -> None:
        """``length`` is the largest number of tokens of the hierarchy."""
        self.block = block
        self.attention_input, self.ff_input = Shift(block.classes), Shift(block.classes)
        self.attention: AttentionCache | None = None
        if block.attn is not None:
            self.attention = AttentionCache(block, -(-length // block.classes))
        self.newest: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        """All tokens of a prompt: ``(B, M, C) -> (B, M, C)``."""
        if self.attention is not None:
            shifted = self.attention_input.read(x)
            x = self.block.by_class(self.attention.read, shifted) + x
        x = self.block.ff(self.ff_input.read(x)) + x
        self.newest = x[:, -1]
        return x

    def step(self, x: Tensor, at: int) -> Tensor:
        """Row ``at``: ``(B, C) -> (B, C)``."""
        if self.attention is not None:
            x = self.attention.step(self.attention_input.step(x, at), at) + x
        self.newest = self.block.ff(self.ff_input.step(x, at)) + x
        return self.newest


class Compression:
    """One compressed token from the embeddings that it is made of, ``(B, c, C0) -> (B, C)``."""

    def __init__(self, compress: Compress) -> None:
        self.factor = compress.factor
        self.function = compress.compress_fn
        if self.factor > 1:
            _, causal, _, contract, _ = compress.compress_fn
            weight = rearrange(causal.conv.weight, "o i k -> o (k i)")
            self.expand = (weight.contiguous(), causal.conv.bias)
            self.contract = (contract.weight[:, :, 0], contract.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.factor == 1:
            return self.function(x[:, 0])
        return F.linear(F.silu(F.linear(x.flatten(1), *self.expand)), *self.contract)


class Decoder:
    """Evaluates a HierarchicalTransformer on sequences that grow to at most seq_len tokens.

    Nothing is computed twice. The weights must not change meanwhile. Use it in
    torch.inference_mode or torch.no_grad: it writes into its buffers.
    """

    def __init__(self, model: HierarchicalTransformer, *, merge: bool = True) -> None:
        self.model = model
        self.merge = merge and len(model.hierarchies) > 1
        self.length = 0
        self.most = max(h.factor for h in model.hierarchies)
        self.embedded: Tensor | None = None  # (B, most - 1 + seq_len, C0), zeros first
        self.compressions = [Compression(compress) for compress in model.compressors]
        self.layers = [
            [
                BlockCache(block, -(-model.seq_len // hierarchy.stride))
                for block, hierarchy in zip(layer, model.hierarchies, strict=True)
            ]
            for layer in model.layers
        ]
        self.embeds: list[Tensor] = []  # the newest of each hierarchy, normalised, (B, C)
        self.logits: Tensor | None = None

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
        x = self.model.token_emb(ids.long())
        if self.embedded is None:
            batch, _, channels = x.shape
            self.embedded = x.new_zeros(batch, self.most - 1 + self.model.seq_len, channels)
        start = self.most - 1 + self.length
        self.embedded[:, start : start + n] = x
        if self.length == 0:
            self._read(x)
        else:
            for at in range(self.length, self.length + n):
                self._step(at)
        self.length += n
        return self.logits

    def _read(self, x: Tensor) -> None:
        """A prompt ``(B, N, C0)`` from its first token on."""
        model = self.model
        layers = [[cache.read for cache in layer] for layer in self.layers]
        tokens = model.run_layers(model.compress(x), layers, merge=self.merge)
        self.embeds = [norm(t[:, -1]) for norm, t in zip(model.norms, tokens, strict=True)]
        self._predict()

    def _step(self, at: int) -> None:
        """The token at place ``at`` of the sequence."""
        model = self.model
        new = [i for i, stride in enumerate(model.strides) if at % stride == 0]
        if not new:
            return
        end = self.most + at
        tokens = {}
        for i in new:
            window = self.embedded[:, end - self.compressions[i].factor : end]
            tokens[i] = model.post_token_emb_norms[i](self.compressions[i](window))
        for index, layer in enumerate(self.layers):
            for i in new:
                tokens[i] = layer[i].step(tokens[i], at // model.strides[i])
            if self.merge:
                everything = torch.cat([cache.newest for cache in layer], dim=-1)
                merged = model.hierarchical_merges[index](everything)
                if model.merge_all:
                    parts = merged.split(model.dims, dim=-1)
                    tokens = {i: t + parts[i] for i, t in tokens.items()}
                else:
                    tokens[model.predict_index] = tokens[model.predict_index] + merged
        for i in new:
            self.embeds[i] = model.norms[i](tokens[i])
        self._predict()

    def _predict(self) -> None:
        embeds = self.embeds
        all_of_them = self.model.predict_all
        x = torch.cat(embeds, dim=-1) if all_of_them else embeds[self.model.predict_index]
        self.logits = self.model.to_logits(x)
