"""Pieces that several models share: norms, token shift, windowed attention, caches, filters.

Shapes: B batch, H heads, N tokens, D head channels, C model channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import hierkernels as hk
from hierkernels.products import linear
from python_models.rotary import LocalRotaryEmbedding, project_turned


def product_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds x to where it enters a product; None if it would stay as it is."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def normalize(x: Tensor, gain: Tensor, eps: float, shift: int = 0) -> Tensor:
    """``s / max(rms(s), eps) * gain`` of ``x (..., N, C)`` after token shift; see hk.rms_norm.

    Meant to enter a product: under autocast the result has the dtype of that.
    """
    to = product_dtype(x)
    if to in (torch.float16, torch.bfloat16) and x.dtype not in (to, torch.float32):
        x = x.float()
    return hk.rms_norm(x, gain, eps=eps, shift=shift, dtype=to)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the channels: its parameters, its results, in one pass each way.

    ``(..., N, C)`` to the same. ``shift`` delays the second half of the channels first, by so many
    tokens (see token_shift). enters_product: under autocast the result has the dtype of a product.
    """

    def __init__(self, dim: int, *, enters_product: bool = True) -> None:
        super().__init__(dim)
        self.enters_product = enters_product

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        to = product_dtype(x) if self.enters_product else x.dtype
        if to in (torch.float16, torch.bfloat16) and x.dtype not in (to, torch.float32):
            x = x.float()
        weight, bias = self.weight, self.bias
        return hk.layer_norm(x, weight, bias, eps=self.eps, shift=shift, dtype=to or x.dtype)


class GELU(nn.Module):
    """GELU in one pass each way: ``(..., C)`` to the same.

    form "halves" gives the two halves of the channels apart, ``(..., C / 2)`` each, "gated" the
    first one times GELU of the second (GEGLU; Shazeer, 2020), ``(..., C / 2)``.
    """

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return hk.gelu(x, form=self.form)


class Linear(nn.Linear):
    """nn.Linear, plus ``residual (..., N)``: its weights, its results, by the quickest product."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, residual)


class PlainRMSNorm(nn.RMSNorm):
    """nn.RMSNorm over the channels: its weight, its results, its gradients in few passes."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, x: Tensor) -> Tensor:
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return hk.rms_norm(x, self.weight, eps=eps, eps_is_added=True, dtype=x.dtype)


class RMSNorm(nn.Module):
    """Scales every token to unit root mean square: ``x / max(rms(x), eps) * g``.

    ``(..., N, C) -> (..., N, C)``. Unlike ``F.rms_norm`` the small number is a floor and not an
    addend, so an ordinary token is normalised exactly (Zhang and Sennrich, 2019, equation 4).
    ``shift`` delays the second half of the channels first, by so many tokens (see token_shift).
    """

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.eps = eps
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        return normalize(x, self.g, self.eps, shift)


class FeedForward(nn.Sequential):
    """Token shift, norm, expansion by ``mult``, GELU, dropout, contraction, plus a residual:
    ``(B, N, C)`` to the same."""

    def __init__(self, *, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__(
            RMSNorm(dim),
            Linear(dim, dim * mult),
            GELU(),
            nn.Dropout(dropout),
            Linear(dim * mult, dim),
        )

    def forward(self, x: Tensor, shift: int = 0, residual: Tensor | None = None) -> Tensor:
        norm, expand, act, dropout, contract = self
        return contract(dropout(act(expand(norm(x, shift)))), residual)


class PreNorm(nn.Module):
    """Layer norm, then fn, which begins with a product and gets further arguments as they are."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.fn(self.norm(x), *args, **options)


class Residual(nn.Module):
    """``x + fn(x)``: fn itself adds its argument residual; it gets further ones as they are."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.fn(x, *args, residual=x, **options)


def token_shift(x: Tensor, by: int = 1) -> Tensor:
    """Delays the second half of the channels by so many positions, zeros first: ``(B, N, C)``."""
    kept, delayed = x.chunk(2, dim=-1)
    by = min(by, x.shape[1])
    return torch.cat((kept, F.pad(delayed, (0, 0, by, -by))), dim=-1)


class LocalAttention(nn.Module):
    """Windowed attention of q, k, v ``(B, H, N, D)`` with rotary positions; any length.

    As in the package local-attention 1.11.2, positions are counted so that with ``look_forward``
    f > 0 each query stands f windows ahead of its own key.
    """

    # xpos grows with the distance from the middle, so that long sequences are cut into segments
    # of so many windows; the last one of each segment is the next one's look-back.
    SEGMENT = 4

    def __init__(
        self,
        *,
        window_size: int,
        dim: int,
        causal: bool = False,
        look_backward: int = 1,
        look_forward: int | None = None,
        dropout: float = 0.0,
        exact_windowsize: bool = False,
        scale: float | None = None,
        use_rotary_pos_emb: bool = True,
        use_xpos: bool = False,
        xpos_scale_base: float | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.causal = causal
        self.look_backward = look_backward
        self.look_forward = (0 if causal else 1) if look_forward is None else look_forward
        self.dropout = dropout
        self.exact_windowsize = exact_windowsize
        self.scale = scale
        self.rel_pos: LocalRotaryEmbedding | None = None
        if use_rotary_pos_emb:
            base = (xpos_scale_base or window_size // 2) if use_xpos else None
            self.rel_pos = LocalRotaryEmbedding(dim, base)

    @property
    def ahead(self) -> int:
        """Positions by which a query is ahead of its own key."""
        return self.look_forward * self.window_size

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
    ) -> Tensor:
        """``(B, H, N, D)``; mask ``(B, N)`` bool, True = real; attn_bias ``(H, w, slots)``."""
        size = self.SEGMENT * self.window_size
        if self.rel_pos is None or self.rel_pos.scale_base is None or q.shape[2] <= size:
            return self._attend(q, k, v, mask, attn_bias)
        batch, length = q.shape[0], q.shape[2]
        before = self.look_backward * self.window_size
        pad = (before, -length % size + self.ahead)
        if mask is None:
            mask = q.new_ones(batch, length, dtype=torch.bool)

        def cut(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0, *pad)).unfold(2, before + size + self.ahead, size)
            return rearrange(x, "b h s d n -> (b s) h n d")

        masks = F.pad(mask, pad, value=False).unfold(1, before + size + self.ahead, size)
        masks = rearrange(masks, "b s n -> (b s) n")
        out = self._attend(cut(q), cut(k), cut(v), masks, attn_bias)
        out = out[:, :, before : before + size]
        return rearrange(out, "(b s) h n d -> b h (s n) d", b=batch)[:, :, :length]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None
    ) -> Tensor:
        if self.rel_pos is not None:
            q, k = self.rel_pos.turn(q, k, self.ahead)
        return self.attend_turned(q, k, v, mask, attn_bias)

    def attend_turned(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_bias: Tensor | None
    ) -> Tensor:
        """As :meth:`forward`, of queries and keys that are turned already."""
        return hk.local_attention(
            q, k, v, self.window_size, is_causal=self.causal, look_backward=self.look_backward,
            look_forward=self.look_forward, exact_window=self.exact_windowsize,
            key_padding_mask=mask, attn_bias=attn_bias, scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last query alone, ``q (B, H, 1, D)``, of a causal layer over all keys so far."""
        reach = self.look_backward * self.window_size + 1
        if not self.exact_windowsize:
            reach += (k.shape[2] - 1) % self.window_size
        k, v = k[:, :, -reach:], v[:, :, -reach:]
        if self.rel_pos is not None:
            q, k = self.rel_pos.turn(q, k, 0)
        return hk.attention(q, k, v, scale=self.scale)


class LocalMHA(nn.Module):
    """Multi-head windowed attention ``(B, N, C) -> (B, N, C)`` of local-attention 1.11.2.

    Its checkpoints load unchanged. ``prenorm`` puts a LayerNorm in front; windows are exact unless
    ``exact_windowsize=False``; ``qk_rmsnorm`` compares directions, times ``qk_scale``;
    ``gate_values_per_head`` gates each head's output. Further options are those of LocalAttention.

    Unlike the original, a token that sees nothing has the output 0, padded tail tokens are never
    seen, and one token at a time gives what all at once do for every option.
    """

    def __init__(
        self,
        *,
        dim: int,
        window_size: int,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        causal: bool = False,
        prenorm: bool = False,
        qk_rmsnorm: bool = False,
        qk_scale: float = 8,
        use_xpos: bool = False,
        xpos_scale_base: float | None = None,
        exact_windowsize: bool | None = None,
        gate_values_per_head: bool = False,
        look_backward: int = 1,
        look_forward: int | None = None,
        use_rotary_pos_emb: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(dim) if prenorm else None
        self.to_qkv = Linear(dim, dim_head * heads * 3, bias=False)
        self.qk_rmsnorm = qk_rmsnorm
        if qk_rmsnorm:
            self.q_scale = nn.Parameter(torch.ones(dim_head))
            self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.attn_fn = LocalAttention(
            window_size=window_size, dim=dim_head, causal=causal, look_backward=look_backward,
            look_forward=look_forward, dropout=dropout,
            exact_windowsize=True if exact_windowsize is None else exact_windowsize,
            scale=qk_scale if qk_rmsnorm else None, use_rotary_pos_emb=use_rotary_pos_emb,
            use_xpos=use_xpos, xpos_scale_base=xpos_scale_base,
        )  # fmt: skip
        self.to_v_gate = nn.Sequential(Linear(dim, heads)) if gate_values_per_head else None
        self.to_out = Linear(dim_head * heads, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        cache: Tensor | None = None,
        return_cache: bool = False,
        shift: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x ``(B, N, C)``; mask ``(B, N)`` bool, True = real token; attn_bias ``(H, w, slots)``.

        ``shift`` delays the second half of the channels first, by so many tokens; needs prenorm.

        With a cache ``(2, B, H, N, D)``, the keys and values that return_cache gave back, x is the
        one new token of a causal layer; mask and attn_bias must be None.
        """
        if self.norm is not None:
            x = self.norm(x, shift)
        elif shift:
            raise ValueError("shift needs prenorm=True: the norm delays the channels")
        rotary = self.attn_fn.rel_pos
        # Keys of a cache are as they were projected; xpos may cut the sequence first.
        turns_first = rotary is not None and rotary.scale_base is None and not self.qk_rmsnorm
        if turns_first and cache is None and not return_cache:
            tables = rotary.turning_tables(x.shape[1], self.attn_fn.ahead)
            turned = project_turned(x, self.to_qkv, self.heads, tables)
            out = self.attn_fn.attend_turned(*turned, mask, attn_bias)
        else:
            out, k, v = self._attend(x, mask, attn_bias, cache)
        if self.to_v_gate is not None:
            out = out * rearrange(self.to_v_gate(x), "b n h -> b h n 1").sigmoid()
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        return (out, torch.stack((k, v))) if return_cache else out

    def _attend(
        self, x: Tensor, mask: Tensor | None, attn_bias: Tensor | None, cache: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The heads' outputs, and keys and values to be kept, not turned; ``(B, H, N, D)``."""
        q, k, v = rearrange(self.to_qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        if self.qk_rmsnorm:
            q = F.normalize(q, dim=-1) * self.q_scale
            k = F.normalize(k, dim=-1) * self.k_scale
        if cache is None:
            out = self.attn_fn(q, k, v, mask=mask, attn_bias=attn_bias)
        else:
            if x.shape[1] != 1 or not self.attn_fn.causal:
                raise ValueError("cache needs one token and causal=True")
            if mask is not None or attn_bias is not None:
                raise ValueError("with a cache, mask and attn_bias must be None")
            k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            out = self.attn_fn.attend_last(q, k, v)
        return out, k, v


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
