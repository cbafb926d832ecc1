"""The NSA Transformer: a decoder whose attention is native sparse attention, or dense.

The layers are in nsa_attention.py, the networks that compress keys and values in
nsa_compression.py, what decoding keeps in nsa_cache.py.

Shapes: B batch, N tokens, C model channels, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from python_models.arguments import check_integer, check_token_type, check_token_values
from python_models.layers import PlainRMSNorm
from python_models.nsa_attention import PRESETS, DenseAttention, SparseAttention
from python_models.nsa_cache import DenseCache, LayerCache
from python_models.pretrained import Pretrained
from python_models.sampling import Recomputation, chooser, collect, draw_tokens

Cache = list[LayerCache] | list[DenseCache]

SEED_SPARSE_ATTN_KWARGS = MappingProxyType(
    {
        "sliding_window_size": 32,
        "compress_block_size": 4,
        "selection_block_size": 4,
        "num_selected_blocks": 4,
    }
)
# Yuan et al., 2025, section 4.1.
PAPER_SPARSE_ATTN_KWARGS = MappingProxyType(
    {
        "sliding_window_size": 512,
        "compress_block_size": 32,
        "compress_block_sliding_stride": 16,
        "selection_block_size": 64,
        "num_selected_blocks": 16,
    }
)


def feed_forward(dim: int, expansion_factor: float = 4.0) -> nn.Sequential:
    """Norm, expansion, GELU, contraction: ``(..., C) -> (..., C)``."""
    hidden = int(dim * expansion_factor)
    return nn.Sequential(
        PlainRMSNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
    )


class Transformer(Pretrained, nn.Module):
    """Autoregressive model of tokens, with sparse or dense attention.

    Args:
        num_tokens, dim, depth: size V of the vocabulary, channels C, layers.
        dim_head, heads, kv_heads: channels of a head (even), query heads, key/value heads (None =
            heads); query head h uses key/value head h // (heads / kv_heads).
        ff_expansion_factor: of the feed-forward layers.
        use_sparse_attn: native sparse attention; else dense attention.
        causal: no token sees a later one.
        use_flex_sliding_window, use_flex_fine_selection, use_triton_fine_selection: accepted so
            that existing code runs; they never change the result.
        sparse_attn_kwargs: further arguments of SparseAttention. Without
            compress_block_sliding_stride, windows do not overlap. Where none are given, the
            preset "paper" takes those of the paper.
        preset: "seed", or "paper" for DeepSeek's definition, see SparseAttention.
        upstream_quirks: the original's results where they are not what was meant, see
            SparseAttention and DenseAttention.

    The state dict is that of native-sparse-attention-pytorch 0.2.3, whatever the flags (preset
    "paper" has its own).
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        ff_expansion_factor: float = 4.0,
        use_sparse_attn: bool = False,
        causal: bool = True,
        use_flex_sliding_window: bool = False,
        use_flex_fine_selection: bool = False,
        use_triton_fine_selection: bool = False,
        sparse_attn_kwargs: Mapping[str, Any] = SEED_SPARSE_ATTN_KWARGS,
        *,
        preset: str = "seed",
        upstream_quirks: bool = False,
    ) -> None:
        super().__init__()
        for name, value, minimum in (
            ("num_tokens", num_tokens, 1),
            ("dim", dim, 1),
            ("depth", depth, 0),
        ):
            check_integer(name, value, minimum=minimum)
        if not ff_expansion_factor > 0:
            raise ValueError(f"ff_expansion_factor must be positive, got {ff_expansion_factor}")
        if use_flex_fine_selection and use_triton_fine_selection:
            raise ValueError(
                "use_flex_fine_selection and use_triton_fine_selection exclude one another"
            )
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        self.num_tokens = num_tokens
        self.causal = causal
        self.use_sparse_attn = use_sparse_attn
        heads_of = {"dim": dim, "dim_head": dim_head, "heads": heads, "kv_heads": kv_heads}
        sparse = _sparse_options(sparse_attn_kwargs, preset)

        def attention() -> nn.Module:
            shared = {**heads_of, "causal": causal, "upstream_quirks": upstream_quirks}
            if not use_sparse_attn:
                return DenseAttention(**shared)
            return SparseAttention(**shared, **sparse, preset=preset)

        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList((attention(), feed_forward(dim, ff_expansion_factor)))
            for _ in range(depth)
        )
        self.norm = PlainRMSNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens, bias=False)

    def forward(
        self,
        ids: Tensor,
        return_loss: bool = False,
        disable_flex: bool = False,
        disable_triton_kernel: bool = False,
        cache: Sequence[Any] | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Logits of the token after each token, or the mean cross-entropy in nats a token.

        Args:
            ids: integer tokens ``(B, N)``. With a cache of N' tokens: the whole sequence, of which
                the tokens from N' on are read, or the one new token alone.
            return_loss: predict every token but the first from those before it.
            disable_flex, disable_triton_kernel: accepted so that existing code runs; they never
                change the result.
            cache: what return_cache gave for the tokens before; it may be used again.
            return_cache: also return the cache, one entry a layer, for the tokens that follow.

        Returns:
            ``(B, N, V)`` (with a cache, of the tokens read), ``(logits, cache)``, or the scalar
            loss.

        Raises:
            TypeError, ValueError: ids are not integers, or of a shape, a device or a value that the
                model does not know; a cache together with return_loss, or of other sequences.
        """
        self._check_ids("ids", ids)
        if return_loss:
            if cache is not None or return_cache:
                raise ValueError("return_loss needs cache=None and return_cache=False")
            if ids.shape[1] < 2:
                raise ValueError(f"return_loss needs two tokens or more, got {tuple(ids.shape)}")
            ids, labels = ids[:, :-1], ids[:, 1:].long()
        if cache is not None:
            ids = self._unread(ids, cache)
        x, new_cache = self.run_layers(ids, cache, return_cache)
        logits = self.to_logits(x)
        if not return_loss:
            return (logits, new_cache) if return_cache else logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(rearrange(logits, "b n v -> b v n"), labels)

    def run_layers(
        self, ids: Tensor, cache: Sequence[Any] | None, return_cache: bool
    ) -> tuple[Tensor, Cache]:
        """What the logits are made from, ``(B, N, C)`` of all ids, and the cache if it is asked."""
        x, new_cache = self.token_emb(ids.long()), []
        for index, (attention, ff) in enumerate(self.layers):
            out = attention(
                x, cache=None if cache is None else cache[index], return_cache=return_cache
            )
            if return_cache:
                out, layer_cache = out
                new_cache.append(layer_cache)
            x = out + x
            x = ff(x) + x
        return self.norm(x), new_cache

    def sample_tokens(
        self,
        prompt: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        top_p: float = 1.0,
        use_cache_kv: bool = True,
        generator: torch.Generator | None = None,
    ) -> Generator[Tensor, None, None]:
        """Yields ``count`` new tokens ``(B,)``, each as soon as it is drawn.

        Arguments and errors as in :meth:`sample`. The model is in evaluation mode from the first
        token until the iterator ends or is closed; the mode it was in comes back then.
        """
        self._check_ids("prompt", prompt)
        check_integer("count", count, minimum=0)
        if prompt.shape[1] == 0 and count:
            raise ValueError(f"prompt must hold one token or more, got {tuple(prompt.shape)}")
        choose = chooser(
            temperature=max(temperature, 0.0),
            filter_thres=filter_thres,
            top_p=top_p,
            generator=generator,
            filter_logits=keep_top_rounded_up,
        )
        if use_cache_kv and not self.causal:
            raise ValueError("use_cache_kv needs causal=True: later tokens change earlier ones")

        def reader() -> CachedReader | Recomputation:
            return CachedReader(self) if use_cache_kv else Recomputation(self)

        return draw_tokens(self, reader, prompt.long(), count, choose)

    def sample(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        use_cache_kv: bool = False,
        *,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Continues ``prompt (B, N)`` to seq_len tokens in all.

        Args:
            seq_len: tokens of the prompt and new ones; at most N gives none.
            temperature: divides the logits; 0 or less takes the most likely token.
            filter_thres: share of the vocabulary that is never drawn, the least likely tokens.
            use_cache_kv: keep what the layers computed instead of computing it for each token.
                The tokens are the same.
            top_p: draw only from the likeliest tokens that together have this probability.
            generator: source of the random numbers; None is PyTorch's default generator.
            on_token: called with each token ``(B,)`` as soon as it is drawn.

        Returns:
            The new tokens alone, ``(B, seq_len - N)``.

        Raises:
            TypeError, ValueError: a prompt that is empty or not of tokens; filter_thres or
                top_p out of range; use_cache_kv of a model that is not causal.
        """
        self._check_ids("prompt", prompt)
        check_integer("seq_len", seq_len, minimum=0)
        tokens = self.sample_tokens(
            prompt,
            max(seq_len - prompt.shape[1], 0),
            temperature=temperature,
            filter_thres=filter_thres,
            top_p=top_p,
            use_cache_kv=use_cache_kv,
            generator=generator,
        )
        start = prompt.new_empty(prompt.shape[0], 0, dtype=torch.long)
        return collect(tokens, start, on_token=on_token)

    def _unread(self, ids: Tensor, cache: Sequence[Any]) -> Tensor:
        """The tokens of ids that the cache has not seen."""
        if len(cache) != len(self.layers):
            raise ValueError(f"cache must have {len(self.layers)} layers, got {len(cache)}")
        read = cache[0].length if cache else ids.shape[1] - 1
        if ids.shape[1] == 1:
            return ids
        if ids.shape[1] <= read:
            raise ValueError(
                f"ids must go on after the {read} tokens of the cache, got {ids.shape[1]} tokens"
            )
        return ids[:, read:]

    def _check_ids(self, name: str, ids: Tensor) -> None:
        check_token_type(name, ids, self.to_logits.weight.device)
        if ids.ndim != 2:
            raise ValueError(f"{name} must be (batch, tokens), got shape {tuple(ids.shape)}")
        check_token_values(name, ids, self.num_tokens)


class CachedReader:
    """Evaluates a Transformer on a sequence that grows; each token is computed once."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.cache: Cache | None = None

    def append(self, ids: Tensor) -> Tensor:
        """Adds tokens ``ids (B, N)``; returns the logits ``(B, V)`` of the token after them."""
        x, self.cache = self.model.run_layers(ids, self.cache, return_cache=True)
        return self.model.to_logits(x[:, -1])


def keep_top_rounded_up(logits: Tensor, thres: float) -> Tensor:
    """As layers.keep_top, with the number of tokens that are kept rounded up."""
    count = max(ceil((1 - thres) * logits.shape[-1]), 1)
    values, indices = logits.topk(count, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter_(-1, indices, values)


def _sparse_options(given: Mapping[str, Any], preset: str) -> dict[str, Any]:
    if preset == "paper" and given is SEED_SPARSE_ATTN_KWARGS:
        given = PAPER_SPARSE_ATTN_KWARGS
    if not isinstance(given, Mapping):
        raise TypeError(f"sparse_attn_kwargs must be a dict, got {type(given).__name__}")
    options = dict(given)
    if "compress_block_size" in options:
        options.setdefault("compress_block_sliding_stride", options["compress_block_size"])
    return options
