"""Where native-sparse-attention-pytorch 0.2.3 computes something else than was meant.

Shapes: B batch, H query heads, N tokens, D head channels, S selection block, w sliding window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import hierkernels as hk
from python_models.nsa_cache import LayerCache

if TYPE_CHECKING:
    from python_models.nsa_attention import SparseAttention


def close_empty_compression(gates: Tensor, layer: SparseAttention, cache: LayerCache) -> Tensor:
    """A cached step before the first compressed token has no memory tokens either: output 0."""
    if len(cache.compressed_keys) > layer.num_mem_compress_kv:
        return gates
    return gates * gates.new_tensor([0.0, 1.0, 1.0])


def attend_both_ways(
    layer: SparseAttention, q: Tensor, rotated_q: Tensor, state: LayerCache, gates: Tensor
) -> Tensor:
    """Without a causal mask: ``(B, H, N, D)``, the branches written out."""
    k, v = state.keys.values, state.values.values
    ck, cv = state.compressed_keys.values, state.compressed_values.values
    options = {
        "stride": layer.compress_block_sliding_stride,
        "first_end": layer.compress_block_sliding_stride - 1,
        "is_causal": False,
    }
    compressed = hk.compressed_attention(q, ck, cv, num_memory=layer.num_mem_compress_kv, **options)
    selected = _selected(layer, q, rotated_q, k, v, ck[:, :, layer.num_mem_compress_kv :], options)
    window = _padded_window(rotated_q, k, v, layer.sliding_window_size)
    return sum(
        gate * out
        for gate, out in zip(
            gates.unsqueeze(-2).unbind(-1), (compressed, selected, window), strict=True
        )
    )


def _selected(
    layer: SparseAttention,
    q: Tensor,
    rotated_q: Tensor,
    k: Tensor,
    v: Tensor,
    ck: Tensor,
    options: dict,
) -> Tensor:
    """No block of its own beside the selected ones, unless nothing at all can be selected."""
    S, n = layer.selection_block_size, k.shape[2]
    per_block = S // layer.compress_block_sliding_stride
    blocks = ck.shape[2] // per_block
    if min(blocks, layer.num_selected_blocks) == 0:
        return _padded_blocks(rotated_q, k, v, S)
    found = hk.select_blocks(
        q,
        ck,
        num_selected=layer.num_selected_blocks,
        block_size=S,
        scoring="logit",
        exclude_own_block=per_block > 1,
        num_keys=n,
        shared=layer.query_heads_share_selected_kv,
        return_probabilities=layer.use_diff_topk,
        **options,
    )
    indices, weights = found, None
    if layer.use_diff_topk:
        indices, p = found
        weights = p + (1 - p).detach()
    out = hk.selected_attention(
        rotated_q, k, v, indices, block_size=S, block_weights=weights, is_causal=False
    )
    if blocks == 1 and per_block > 1:
        # The one block is every query's only choice and its own queries may not have it: their
        # softmax over nothing but masked keys is the mean.
        mean = v[:, :, :S].mean(dim=2, keepdim=True)
        mean = mean.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        out = torch.cat((mean.expand(-1, -1, S, -1), out[:, :, S:]), dim=2)
    return out


def _pad(t: Tensor, multiple: int) -> Tensor:
    return F.pad(t, (0, 0, 0, -t.shape[2] % multiple))


def _padded_blocks(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Attention within blocks; the zeros that fill the last one are keys and values too."""
    out = hk.local_attention(
        *(_pad(t, size) for t in (q, k, v)), size, is_causal=False, look_backward=0, look_forward=0
    )
    return out[:, :, : q.shape[2]]


def _padded_window(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """An exact window both ways; the zeros up to the next multiple of it are keys and values."""
    q_padded, k, v = (_pad(t, size) for t in (q, k, v))
    return hk.attention(q_padded, k, v, window_size=(size, size))[:, :, : q.shape[2]]
