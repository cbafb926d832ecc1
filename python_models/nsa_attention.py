"""The attention layers of the NSA Transformer: native sparse attention, and dense attention.

Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
2025 (arXiv 2502.11089). A query attends to compressed tokens, one for each window of the past; to
whole blocks of tokens that its compressed scores select; and to a sliding window. Gates of its own
add the three up.

Shapes: B batch, N tokens, C model channels, H query heads, Hkv key/value heads, D head channels,
l tokens of a compression window, d its stride, W windows, M memory tokens.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import hierkernels as hk
from python_models import nsa_quirks
from python_models.arguments import check_integer
from python_models.interleaved_rotary import (
    InterleavedRotaryEmbedding,
    apply_interleaved_rotary,
)
from python_models.layers import Linear, PlainRMSNorm
from python_models.nsa_cache import DenseCache, LayerCache, Tokens
from python_models.nsa_compression import CompressMLP, cut_windows

PRESETS = ("seed", "paper")


def check_heads(heads: int, kv_heads: int | None, dim_head: int) -> int:
    """Returns the number of key/value heads."""
    check_integer("heads", heads, minimum=1)
    check_integer("dim_head", dim_head, minimum=1)
    if dim_head % 2:
        raise ValueError(f"dim_head must be even for rotary positions, got {dim_head}")
    if kv_heads is None:
        return heads
    check_integer("kv_heads", kv_heads, minimum=1)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads = {heads}, got {kv_heads}")
    return kv_heads


class DenseAttention(nn.Module):
    """Softmax attention over all tokens with interleaved rotary positions and grouped heads.

    ``x (B, N, C) -> (B, N, C)``. With upstream_quirks, query head h uses key/value head
    ``h % kv_heads`` instead of ``h // (heads / kv_heads)``, as native-sparse-attention-pytorch does
    here and nowhere else.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        causal: bool = True,
        kv_heads: int | None = None,
        *,
        upstream_quirks: bool = False,
    ) -> None:
        super().__init__()
        check_integer("dim", dim, minimum=1)
        self.heads, self.kv_heads = heads, check_heads(heads, kv_heads, dim_head)
        self.causal = causal
        self.upstream_quirks = upstream_quirks
        self.norm = PlainRMSNorm(dim)
        self.rotary_embed = InterleavedRotaryEmbedding(dim_head)
        self.to_q = Linear(dim, heads * dim_head, bias=False)
        self.to_k = Linear(dim, self.kv_heads * dim_head, bias=False)
        self.to_v = Linear(dim, self.kv_heads * dim_head, bias=False)
        self.to_out = Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x: Tensor, cache: DenseCache | None = None, return_cache: bool = False
    ) -> Tensor | tuple[Tensor, DenseCache]:
        """With a cache, x holds the tokens after those of the cache."""
        _check_cache(cache, return_cache, self.causal, DenseCache)
        x = self.norm(x)
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = (
            rearrange(project(x), "b n (h d) -> b h n d", h=self.kv_heads)
            for project in (self.to_k, self.to_v)
        )
        first = 0 if cache is None else cache.length
        rotary = self.rotary_embed(first, x.shape[1])
        q, k = apply_interleaved_rotary(q, rotary), apply_interleaved_rotary(k, rotary)
        keys = Tokens(k) if cache is None else cache.keys.append(k)
        values = Tokens(v) if cache is None else cache.values.append(v)
        if self.upstream_quirks:
            q = rearrange(q, "b (g h) n d -> b (h g) n d", h=self.kv_heads)
        out = hk.attention(q, keys.values, values.values, is_causal=self.causal)
        if self.upstream_quirks:
            out = rearrange(out, "b (h g) n d -> b (g h) n d", h=self.kv_heads)
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        return (out, DenseCache(first + x.shape[1], keys, values)) if return_cache else out


def _check_cache(cache: Any, return_cache: bool, causal: bool, kind: type) -> None:
    if not causal and (cache is not None or return_cache):
        raise ValueError(
            "cache and return_cache need causal=True: later tokens change earlier ones"
        )
    if cache is not None and not isinstance(cache, kind):
        raise TypeError(f"cache must be what return_cache gave, got {type(cache).__name__}")


class SparseAttention(nn.Module):
    """Native sparse attention ``(B, N, C) -> (B, N, C)``, any length.

    Args:
        dim, dim_head, heads: channels C, channels D of a head (even), query heads H.
        sliding_window_size: tokens before its own that a query sees ("paper": its own included).
        compress_block_size: l, tokens of a compression window.
        compress_block_sliding_stride: d, from one window to the next; at most l.
        selection_block_size: S, tokens of a block that may be selected; a multiple of d.
        num_selected_blocks: blocks a query selects; 0 leaves its own block ("seed").
        kv_heads: Hkv, a divisor of heads; None = heads.
        num_compressed_mem_kv: M, learned compressed keys and values that every query sees
            ("paper" has none, whatever is given).
        causal: no token sees a later one.
        norm: an RMSNorm in front.
        use_diff_topk: selected keys are multiplied by p + (1 - p).detach(), p their block's
            probability, so that the scores that select get a gradient ("seed").
        use_triton_kernel: accepted so that existing code runs; it never changes the result.
        query_heads_share_selected_kv: query heads of a group select together.
        compress_mlp: a network of nsa_compression, copied for keys and for values; None = two
            layers over the flattened window, compress_mlp_expand_factor times as wide.
        strategy_combine_mlp: ``(B, N, C) -> (B, N, 3 H)``, the gates before the sigmoid, three a
            head in the order compressed, selected, window; None = a linear layer that begins with
            the sliding window open.
        preset: "seed", the definition of native-sparse-attention-pytorch 0.2.3, whose state dict
            loads unchanged; or "paper", DeepSeek's: windows without padding, block scores summed
            over probabilities, the first and the last two blocks always selected, keys and values
            for each branch, M = 0.
        upstream_quirks: 0.2.3's results where they are not what was meant: cached steps lose the
            memory tokens until there is a compressed one; without causal, queries do not see
            their own block and see the zeros that pad the last window.

    Compressed keys and the queries that meet them carry no rotary positions, in either preset.

    Raises:
        ValueError, TypeError: an argument out of range, or that the preset does not have.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        sliding_window_size: int,
        compress_block_size: int,
        compress_block_sliding_stride: int,
        selection_block_size: int,
        num_selected_blocks: int,
        kv_heads: int | None = None,
        num_compressed_mem_kv: int = 1,
        causal: bool = False,
        norm: bool = True,
        use_diff_topk: bool = False,
        use_triton_kernel: bool = False,
        query_heads_share_selected_kv: bool = True,
        compress_mlp: nn.Module | None = None,
        compress_mlp_expand_factor: float = 1.0,
        strategy_combine_mlp: nn.Module | None = None,
        *,
        preset: str = "seed",
        upstream_quirks: bool = False,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        is_paper = preset == "paper"
        memory = 0 if is_paper else num_compressed_mem_kv
        for name, value, minimum in (
            ("dim", dim, 1),
            ("sliding_window_size", sliding_window_size, 1),
            ("compress_block_size", compress_block_size, 1),
            ("compress_block_sliding_stride", compress_block_sliding_stride, 1),
            ("selection_block_size", selection_block_size, 1),
            ("num_selected_blocks", num_selected_blocks, 3 if is_paper else 0),
            ("num_compressed_mem_kv", memory, 0),
        ):
            check_integer(name, value, minimum=minimum)
        kv_heads = check_heads(heads, kv_heads, dim_head)
        size, stride = compress_block_size, compress_block_sliding_stride
        if size < stride:
            raise ValueError(
                "compress_block_size must be at least compress_block_sliding_stride = "
                f"{stride}, got {size}"
            )
        if selection_block_size % stride or (is_paper and size % stride):
            raise ValueError(
                "compress_block_sliding_stride must divide selection_block_size (and, with "
                'preset="paper", compress_block_size); '
                f"got {stride}, {selection_block_size} and {size}"
            )
        if is_paper and (not causal or use_diff_topk or upstream_quirks):
            raise ValueError(
                'preset "paper" needs causal=True, use_diff_topk=False and upstream_quirks=False'
            )
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.sliding_window_size = sliding_window_size
        self.compress_block_size, self.compress_block_sliding_stride = size, stride
        self.selection_block_size = selection_block_size
        self.num_selected_blocks = num_selected_blocks
        self.num_mem_compress_kv = memory
        self.causal, self.use_diff_topk = causal, use_diff_topk
        self.query_heads_share_selected_kv = query_heads_share_selected_kv
        self.preset, self.upstream_quirks = preset, upstream_quirks
        # Zeros before the first token, so that a window ends at every d-th.
        self.padding = 0 if is_paper else size - stride

        self.norm = PlainRMSNorm(dim) if norm else nn.Identity()
        self.rotary_emb = InterleavedRotaryEmbedding(dim_head)
        branches = 3 if is_paper else 1
        self.qkv_split = (heads * dim_head, *(kv_heads * dim_head,) * (2 * branches))
        self.to_qkv = Linear(dim, sum(self.qkv_split), bias=False)
        if memory:
            self.compress_mem_kv = nn.Parameter(torch.zeros(2, kv_heads, memory, dim_head))
        self.k_intrablock_positions = nn.Parameter(torch.zeros(kv_heads, size, dim_head))
        self.v_intrablock_positions = nn.Parameter(torch.zeros(kv_heads, size, dim_head))
        if compress_mlp is None:
            compress_mlp = CompressMLP(dim_head, size, compress_mlp_expand_factor)
        self.k_compress = deepcopy(compress_mlp)
        self.v_compress = deepcopy(compress_mlp)
        if strategy_combine_mlp is None:
            strategy_combine_mlp = nn.Linear(dim, 3 * heads)
            nn.init.zeros_(strategy_combine_mlp.weight)
            with torch.no_grad():
                strategy_combine_mlp.bias.copy_(torch.tensor([-2.0, -2.0, 2.0] * heads))
        self.to_strategy_combine = nn.Sequential(
            strategy_combine_mlp, nn.Sigmoid(), Rearrange("b n (h s) -> b h n s", h=heads)
        )
        self.combine_heads = Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        inp: Tensor,
        cache: LayerCache | None = None,
        disable_triton_kernel: bool = False,
        sliding_window_flex_mask: Any = None,
        fine_selection_flex_mask: Any = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, LayerCache]:
        """``out (B, N, C)``, or ``(out, cache)`` with return_cache.

        Args:
            inp: ``(B, N, C)``; with a cache, the tokens after those of the cache, usually one.
            cache: what return_cache gave for the tokens before. It stays as it is and may be used
                again. The result is that of all tokens at once.
            disable_triton_kernel, sliding_window_flex_mask, fine_selection_flex_mask: accepted so
                that existing code runs; they never change the result.

        Raises:
            ValueError, TypeError: inp of another shape, or a cache that does not belong to it.
        """
        if inp.ndim != 3 or inp.shape[-1] != self.to_qkv.in_features:
            raise ValueError(
                f"inp must be (batch, tokens, {self.to_qkv.in_features}), got {tuple(inp.shape)}"
            )
        _check_cache(cache, return_cache, self.causal, LayerCache)
        if cache is not None and cache.keys.values.shape[0] != inp.shape[0]:
            raise ValueError(
                f"inp must have the batch size of the cache ({cache.keys.values.shape[0]}), "
                f"got {inp.shape[0]}"
            )
        x = self.norm(inp)
        q, *kv = self.to_qkv(x).split(self.qkv_split, dim=-1)
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        kv = [rearrange(t, "b n (h d) -> b h n d", h=self.kv_heads) for t in kv]
        rotary = self.rotary_emb(0 if cache is None else cache.length, x.shape[1])
        state = self._read(kv, rotary, cache)
        rotated_q = apply_interleaved_rotary(q, rotary)
        gates = self.to_strategy_combine(x)
        if self.upstream_quirks and cache is not None:
            gates = nsa_quirks.close_empty_compression(gates, self, cache)
        attend = self._attend
        if self.upstream_quirks and not self.causal:
            attend = partial(nsa_quirks.attend_both_ways, self)
        out = attend(q, rotated_q, state, gates)
        out = self.combine_heads(rearrange(out, "b h n d -> b n (h d)"))
        return (out, state) if return_cache else out

    def _read(
        self, kv: list[Tensor], rotary: tuple[Tensor, Tensor], cache: LayerCache | None
    ) -> LayerCache:
        """The state after new tokens, whose keys and values of each branch are kv."""
        plain_k, plain_v = kv[:2]
        k, v = kv[2:4] if self.preset == "paper" else kv
        if cache is None:
            cache = self._empty_cache(plain_k)
        ck, pending_k = self._compress(plain_k, cache.pending_keys, is_value=False)
        cv, pending_v = self._compress(plain_v, cache.pending_values, is_value=True)
        window_keys = window_values = None
        if self.preset == "paper":
            assert cache.window_keys is not None and cache.window_values is not None
            window_keys = cache.window_keys.append(apply_interleaved_rotary(kv[4], rotary))
            window_values = cache.window_values.append(kv[5])
        return LayerCache(
            cache.length + plain_k.shape[2],
            cache.keys.append(apply_interleaved_rotary(k, rotary)),
            cache.values.append(v),
            cache.compressed_keys.append(ck),
            cache.compressed_values.append(cv),
            pending_k,
            pending_v,
            window_keys,
            window_values,
        )

    def _empty_cache(self, like: Tensor) -> LayerCache:
        batch, heads, _, dim = like.shape
        nothing, pending = (
            like.new_empty(batch, heads, 0, dim),
            like.new_zeros(batch, heads, self.padding, dim),
        )
        ck = cv = nothing
        if self.num_mem_compress_kv:
            ck, cv = repeat(self.compress_mem_kv.to(like.dtype), "kv h m d -> kv b h m d", b=batch)
        none = Tokens(nothing)
        window = none if self.preset == "paper" else None
        return LayerCache(0, none, none, Tokens(ck), Tokens(cv), pending, pending, window, window)

    def _compress(self, x: Tensor, pending: Tensor, *, is_value: bool) -> tuple[Tensor, Tensor]:
        """One token for each window that x ``(B, Hkv, N, D)`` completes, and what is left over."""
        x = torch.cat((pending, x), dim=2)
        windows = cut_windows(x, self.compress_block_size, self.compress_block_sliding_stride)
        count = windows.shape[2]
        rest = x[:, :, count * self.compress_block_sliding_stride :].clone()  # frees the others
        if count == 0:
            return x[:, :, :0], rest
        positions = self.v_intrablock_positions if is_value else self.k_intrablock_positions
        compress = self.v_compress if is_value else self.k_compress
        return compress(windows + rearrange(positions, "h l d -> h 1 l d")), rest

    def _attend(self, q: Tensor, rotated_q: Tensor, state: LayerCache, gates: Tensor) -> Tensor:
        return hk.native_sparse_attention(
            rotated_q,
            state.keys.values,
            state.values.values,
            state.compressed_keys.values,
            state.compressed_values.values,
            gates,
            preset=self.preset,
            block_size=self.selection_block_size,
            num_selected=self.num_selected_blocks,
            window_size=self.sliding_window_size,
            stride=self.compress_block_sliding_stride,
            first_end=self.compress_block_size - 1 - self.padding,
            compression_window=self.compress_block_size,
            q_cmp=q,
            k_window=None if state.window_keys is None else state.window_keys.values,
            v_window=None if state.window_values is None else state.window_values.values,
            num_memory=self.num_mem_compress_kv,
            use_diff_topk=self.use_diff_topk,
            shared=self.query_heads_share_selected_kv,
            is_causal=self.causal,
        )
