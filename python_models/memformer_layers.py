"""Attention, layers and token embedding of Memformer's encoder and decoder.

Shapes: B batch, N tokens, C channels, H heads, D = C / H channels of a head, V tokens of a
vocabulary.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

import hierkernels as hk
from python_models.arguments import check_token_type, check_token_values
from python_models.layers import GELU, LayerNorm, Linear, PreNorm, Residual
from python_models.relative_position import RelativePositionBias


class Attention(nn.Module):
    """Multi-head attention ``x (B, N, C)`` to ``(B, N, C)``, to x or to a context.

    upstream_quirks: a query that may see no key gets the mean of all values instead of 0.
    """

    def __init__(
        self, dim: int, *, heads: int, is_causal: bool = False, upstream_quirks: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.upstream_quirks = upstream_quirks
        self.to_q = Linear(dim, dim)
        self.to_kv = Linear(dim, 2 * dim)
        self.to_out = Linear(dim, dim)

    def queries(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, H, N, D)``."""
        return rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)

    def keys_and_values(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, 2 H, N, D)``: the keys of all heads, then the values."""
        return rearrange(self.to_kv(x), "b n (kv h d) -> b (kv h) n d", kv=2, h=self.heads)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None = None,
        query_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``(B, H, N, D)`` three times to ``(B, N, C)``, plus a residual.

        bias broadcasts to the scores; query_mask and key_mask ``(B, tokens)`` say which tokens are
        real; mask broadcasts to the scores. True = may attend.
        """
        if query_mask is not None:
            rows = rearrange(query_mask, "b n -> b 1 n 1")
            mask = rows if mask is None else mask & rows
        out = hk.attention(
            q, k, v, is_causal=self.is_causal, attn_bias=bias,
            attn_mask=mask, key_padding_mask=key_mask,
        )  # fmt: skip
        if self.upstream_quirks and (query_mask is not None or key_mask is not None):
            out = self._uniform_where_blind(out, v, query_mask, key_mask)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"), residual)

    @staticmethod
    def _uniform_where_blind(
        out: Tensor, v: Tensor, query_mask: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        """Puts the mean of all values where a query sees no key.

        Every score is then the least number, so that the softmax is uniform, over masked and
        later keys as well.
        """
        blind = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=out.device)
        if query_mask is not None:
            blind = blind | ~rearrange(query_mask, "b n -> b 1 n 1")
        if key_mask is not None:
            blind = blind | ~rearrange(key_mask.any(1), "b -> b 1 1 1")
        return torch.where(blind, v.mean(2, keepdim=True), out)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        query_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attention of x to context, or to itself; the rest as in :meth:`attend`."""
        k, v = self.keys_and_values(x if context is None else context).chunk(2, dim=1)
        return self.attend(
            self.queries(x), k, v, bias=bias, query_mask=query_mask, key_mask=key_mask,
            residual=residual,
        )  # fmt: skip


class FeedForward(nn.Module):
    """Expansion by 4, GELU, contraction, plus a residual: ``(..., C) -> (..., C)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Linear(dim, 4 * dim), GELU(), Linear(4 * dim, dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        expand, act, contract = self.net
        return contract(act(expand(x)), residual)


class Layers(nn.Module):
    """Layers of self attention, cross attention and feed-forward: ``(B, N, C) -> (B, N, C)``.

    The self attention of all layers shares one bias by relative position; cross attention has none.
    """

    def __init__(
        self, *, dim: int, depth: int, heads: int, is_causal: bool, upstream_quirks: bool
    ) -> None:
        super().__init__()
        # The original has the causal buckets in its encoder, which so tells no key after the query
        # from another, and the two-sided ones in its decoder.
        self.rel_pos_emb = RelativePositionBias(heads=heads, is_causal=is_causal != upstream_quirks)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            parts = (
                Attention(dim, heads=heads, is_causal=is_causal, upstream_quirks=upstream_quirks),
                Attention(dim, heads=heads, upstream_quirks=upstream_quirks),
                FeedForward(dim),
            )
            self.layers.append(nn.ModuleList(Residual(PreNorm(dim, part)) for part in parts))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        mask: Tensor | None = None,
        cross_query_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Self attention among the tokens of ``mask (B, N)``, cross attention from those of
        cross_query_mask to those of ``context_mask``, all True where real.
        """
        bias = self.rel_pos_emb(x.shape[1])
        for self_attention, cross_attention, feed_forward in self.layers:
            x = self_attention(x, bias=bias, query_mask=mask, key_mask=mask)
            x = cross_attention(x, context, query_mask=cross_query_mask, key_mask=context_mask)
            x = feed_forward(x)
        return x


class TransformerWrapper(nn.Module):
    """Token embedding, layers and norm, ``(B, N)`` to ``(B, N, C)``, or to logits ``(B, N, V)``."""

    def __init__(
        self, *, num_tokens: int, max_seq_len: int, dim: int, layers: Layers, to_logits: bool
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layer_blocks = layers
        self.norm = LayerNorm(dim, enters_product=False)
        self.to_logits = Linear(dim, num_tokens) if to_logits else nn.Identity()

    def forward(self, ids: Tensor, context: Tensor, **masks: Tensor | None) -> Tensor:
        x = self.layer_blocks(self.token_emb(ids), context, **masks)
        return self.to_logits(self.norm(x))

    def check_tokens(self, name: str, ids: Tensor, *, batch: int | None = None) -> None:
        """Raises TypeError or ValueError unless ids are tokens ``(B, N)`` that the model knows."""
        check_token_type(name, ids, self.token_emb.weight.device)
        if ids.ndim != 2:
            raise ValueError(f"{name} must be (batch, tokens), got shape {tuple(ids.shape)}")
        if batch is not None and ids.shape[0] != batch:
            raise ValueError(
                f"{name} must have the batch size of src ({batch}), got {ids.shape[0]}"
            )
        check_token_values(name, ids, self.num_tokens)
