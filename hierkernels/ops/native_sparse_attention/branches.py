"""The three branches of native sparse attention, each by a public operator."""

from __future__ import annotations

import torch

from hierkernels.ops.attention import attention
from hierkernels.ops.compressed_attention import compressed_attention
from hierkernels.ops.local_attention import local_attention
from hierkernels.ops.native_sparse_attention.call import NsaCall
from hierkernels.ops.select_blocks import select_blocks
from hierkernels.ops.selected_attention import selected_attention

Branches = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_OneOrTwo = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def _one(result: _OneOrTwo) -> torch.Tensor:
    """The result of an operator that was asked for one tensor."""
    assert isinstance(result, torch.Tensor)
    return result


def _two(result: _OneOrTwo) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of an operator that was asked for two."""
    assert isinstance(result, tuple)
    return result


def branches(call: NsaCall, backend: str | None) -> Branches:
    """(compressed, selected, window), each (B, Hq, Nq, Dv)."""
    compressed, lse = _two(compressed_attention(
        call.q_cmp, call.k_cmp, call.v_cmp,
        stride=call.stride, first_end=call.first_end, num_memory=call.num_memory,
        strict=call.definition.strict, is_causal=call.is_causal,
        query_offset=call.first_position, scale=call.scale, return_lse=True, backend=backend,
    ))  # fmt: skip
    window = _one(attention(
        call.q, call.k_window, call.v_window, is_causal=call.is_causal,
        window_size=(call.reach, call.reach), scale=call.scale, backend=backend,
    ))  # fmt: skip
    return compressed, selected(call, lse, backend), window


def selected(call: NsaCall, lse: torch.Tensor, backend: str | None) -> torch.Tensor:
    """The branch of the selected blocks; lse is that of the compressed branch."""
    if call.definition.own_block and _only_own_block(call):
        return _one(local_attention(
            call.q, call.k, call.v, call.block_size, is_causal=call.is_causal, look_backward=0,
            look_forward=0, scale=call.scale, backend=backend,
        ))  # fmt: skip
    indices, weights = select(call, lse, backend)
    return _one(selected_attention(
        call.q, call.k, call.v, indices, block_size=call.block_size, block_weights=weights,
        include_own_block=call.definition.own_block, is_causal=call.is_causal,
        check_indices=False, scale=call.scale, backend=backend,
    ))  # fmt: skip


def _only_own_block(call: NsaCall) -> bool:
    """Nothing can be selected and all queries are there: attention within buckets."""
    blocks = call.compressed_tokens.shape[2] // (call.block_size // call.stride)
    return not min(call.num_selected, blocks) and not call.first_position


def select(
    call: NsaCall, lse: torch.Tensor, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(indices, weights) of the selected blocks; weights are 1, with the gradient of p."""
    definition = call.definition
    by_probability = definition.scoring == "probability"
    found = select_blocks(
        call.q_cmp, call.compressed_tokens,
        num_selected=call.num_selected, block_size=call.block_size, stride=call.stride,
        first_end=call.first_end, scoring=definition.scoring,
        window_size=call.compression_window if by_probability else None,
        lse=lse if by_probability else None, strict=definition.strict, is_causal=call.is_causal,
        num_initial=definition.num_initial, num_local=definition.num_local,
        query_offset=call.first_position, num_keys=call.k.shape[2], shared=call.shared,
        scale=call.scale, return_probabilities=call.use_diff_topk, backend=backend,
    )  # fmt: skip
    if not call.use_diff_topk:
        return _one(found), None
    indices, p = _two(found)
    return indices, p + (1 - p).detach()
