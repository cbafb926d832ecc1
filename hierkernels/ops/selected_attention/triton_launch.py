"""Plans the launches of one selected_attention call: which kernels, on which tiles.

A plan only looks at shapes, strides and dtypes: triton.py runs it, aot.py compiles it.
"""

from __future__ import annotations

from typing import Any

import torch

from hierkernels.key_parts import count_parts
from hierkernels.ops.selected_attention import triton_configs as configs
from hierkernels.ops.selected_attention.call import SelectedCall
from hierkernels.ops.selected_attention.triton_backward import (
    _selected_attention_backward_dkv_kernel,
    _selected_attention_backward_dq_kernel,
    _selected_attention_backward_sum_kernel,
)
from hierkernels.ops.selected_attention.triton_blocks import _selected_attention_lists_kernel
from hierkernels.ops.selected_attention.triton_forward import _selected_attention_forward_kernel
from hierkernels.ops.selected_attention.triton_inverse import Inverse, invert
from hierkernels.triton_common.configs import Config
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.parts import Records
from hierkernels.triton_common.tiles import LOG2E, cdiv, padded, power_of_2, rows_stride

# Elements of a tile of the lists kernel, which compares each column with every other.
_LIST_TILE = 2048


def _block_size(call: SelectedCall) -> int:
    """The same blocks where one block holds all keys, and fewer kernels: the size is compiled."""
    return min(call.block_size, power_of_2(call.k.shape[2]))


def _heads(call: SelectedCall) -> int:
    """Query heads that share a choice of blocks: the rows of a query."""
    return call.q.shape[1] // call.indices.shape[1]


def _configuration(call: SelectedCall, target: Target, kernel: str) -> Config:
    channels = max(call.q.shape[-1], call.v.shape[-1])
    return configs.configuration(
        target, kernel, channels, call.q.element_size(), _block_size(call), _heads(call)
    )


# ---- lists ----


def plan_lists(call: SelectedCall) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch that fills lists (B, index heads, Nq, columns) and counts (B, heads, Nq)."""
    B, heads, Nq, n = call.indices.shape
    lists = call.indices.new_empty((B, heads, Nq, call.columns), dtype=torch.int32)
    counts = call.indices.new_empty((B, heads, Nq), dtype=torch.int32)
    block_n = power_of_2(max(n, 1))
    block_m = max(_LIST_TILE // block_n, 1)
    launch = Launch(_selected_attention_lists_kernel, cdiv(B * heads * Nq, block_m), {
        "indices_ptr": call.indices, "lists_ptr": lists, "counts_ptr": counts,
        "stride_indices": call.indices.stride(), "n_rows": B * heads * Nq, "n_heads": heads,
        "n_queries": Nq, "n_columns": n, "n_blocks": call.blocks,
        "first_position": call.first_position, "BLOCK_SIZE": _block_size(call),
        "OWN": int(call.include_own_block), "CAUSAL": call.is_causal, "BLOCK_M": block_m,
        "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True,
    })  # fmt: skip
    return launch, lists, counts


# ---- arguments ----


def _every_kernel(call: SelectedCall, target: Target) -> dict[str, Any]:
    """The arguments that all kernels of the products take."""
    D, Dv = call.q.shape[-1], call.v.shape[-1]
    natural = call.q.dtype == torch.float32
    return {
        "q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v, "stride_q": rows_stride(call.q),
        "stride_k": rows_stride(call.k), "stride_v": rows_stride(call.v),
        "score_scale": call.scale * (1.0 if natural else LOG2E.value),
        "n_heads": call.q.shape[1], "n_queries": call.q.shape[2], "n_keys": call.k.shape[2],
        "first_position": call.first_position, "D": D, "DV": Dv, "BLOCK_D": padded(D),
        "BLOCK_DV": padded(Dv), "BLOCK_SIZE": _block_size(call), "GROUP": call.group,
        "PACK": _heads(call), "CAUSAL": call.is_causal, "WEIGHTED": call.weights is not None,
        # A positive scale alone commutes with the maximum and can wait for the exponent.
        "FUSED": not natural and call.weights is None and call.scale > 0, "NATURAL": natural,
        "PRECISION": target.precision,
    }  # fmt: skip


def _query_major(
    call: SelectedCall,
    target: Target,
    kernel: str,
    lists: torch.Tensor,
    counts: torch.Tensor,
    whole_tiles: bool = False,
) -> dict[str, Any]:
    """The arguments of the forward and of dq; whole_tiles: each tile of keys lies in one block."""
    config, size = _configuration(call, target, kernel), _block_size(call)
    gather = size % config.block_n != 0 and not whole_tiles
    block_n = config.block_n
    if whole_tiles:
        block_n = min(block_n, max(16, power_of_2(size)))
    return {
        **_every_kernel(call, target), "weights_ptr": call.weights,
        "stride_weights": (0, 0, 0, 0) if call.weights is None else call.weights.stride(),
        "lists_ptr": lists, "counts_ptr": counts, "n_columns": lists.shape[3],
        "OWN": int(call.include_own_block), "GATHER": gather, "BLOCK_M": config.block_m,
        "BLOCK_N": block_n, **config.compiler_options(),
    }  # fmt: skip


# ---- forward ----


def plan_forward(
    call: SelectedCall, target: Target, out: torch.Tensor, lse: torch.Tensor
) -> list[Launch]:
    """The launches that fill out and lse; nothing in the call is empty, there are columns."""
    fill, lists, counts = plan_lists(call)
    programs, named = counts.numel(), call.columns * _block_size(call)
    parts = count_parts(target.multiprocessors, programs, _heads(call), min(named, call.k.shape[2]))
    records = Records.new(lse, parts, call.v.shape[3])
    forward = Launch(_selected_attention_forward_kernel, programs * parts, {
        **_query_major(call, target, "forward", lists, counts), **records.arguments(),
        "out_ptr": out, "lse_ptr": lse, "stride_out": rows_stride(out),
    })  # fmt: skip
    natural = forward.arguments["NATURAL"]
    return [fill, forward, *records.combine(target, out, lse, natural, 1.0)]


# ---- backward ----


def plan_queries(
    call: SelectedCall,
    target: Target,
    saved: tuple[torch.Tensor, torch.Tensor],
    given: tuple[torch.Tensor, torch.Tensor | None],
    dq: torch.Tensor,
    dweights: torch.Tensor | None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches that fill dq and dweights, the lists and the row statistics (level, delta).

    saved: (out, lse); given: (dout, dlse), dlse contiguous; dweights holds zeros.
    """
    (out, lse), (dout, dlse) = saved, given
    fill, lists, counts = plan_lists(call)
    stats = lse.new_empty((2, counts.numel() * _heads(call)))
    level, delta = stats
    launch = Launch(_selected_attention_backward_dq_kernel, counts.numel(), {
        **_query_major(call, target, "dq", lists, counts, dweights is not None),
        "out_ptr": out, "dout_ptr": dout, "lse_ptr": lse, "dlse_ptr": dlse, "level_ptr": level,
        "delta_ptr": delta, "dq_ptr": dq, "dweights_ptr": dweights,
        "stride_out": rows_stride(out), "stride_dout": rows_stride(dout),
        "stride_dq": rows_stride(dq), "scale": call.scale, "DLSE": dlse is not None,
        "DWEIGHTS": dweights is not None,
    })  # fmt: skip
    return [fill, launch], lists, stats


def inverse_of(call: SelectedCall, target: Target, lists: torch.Tensor) -> Inverse:
    """The queries of each block, from filled lists."""
    weights = None
    if call.weights is not None:
        weights = call.weights.float()
        if call.include_own_block:
            weights = torch.nn.functional.pad(weights, (1, 0), value=1.0)
    least = configs.least_chunk(target, _heads(call))
    return invert(lists, weights, call.k.shape[1], call.blocks, least)


def plan_keys(
    call: SelectedCall,
    target: Target,
    inverse: Inverse,
    stats: torch.Tensor,
    dout: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> list[Launch]:
    """The launches that fill dk and dv."""
    config, size = _configuration(call, target, "dkv"), _block_size(call)
    level, delta = stats
    work = inverse.items
    pairs, items = work.item_block.shape
    channels = call.q.shape[-1] + call.v.shape[-1]
    parts = None
    if work.parts:
        parts = level.new_empty((work.parts, size, channels))
    tiles, every = cdiv(size, config.block_n), _every_kernel(call, target)
    both = {
        "dk_ptr": dk, "dv_ptr": dv, "parts_ptr": parts, "starts_ptr": inverse.starts,
        "first_part_ptr": work.first_part, "stride_dk": rows_stride(dk),
        "stride_dv": rows_stride(dv), "chunk": work.chunk, "n_blocks": call.blocks,
        "BLOCK_N": config.block_n, **config.compiler_options(),
    }  # fmt: skip
    launches = [Launch(_selected_attention_backward_dkv_kernel, pairs * items * tiles, {
        **every, **both, "dout_ptr": dout, "level_ptr": level, "delta_ptr": delta,
        "rows_ptr": inverse.rows, "row_weights_ptr": inverse.weights,
        "first_item_ptr": work.first_item, "item_block_ptr": work.item_block,
        "stride_dout": rows_stride(dout), "scale": call.scale, "n_items": items,
        "BLOCK_M": config.block_m, "SPLIT": parts is not None,
    })]  # fmt: skip
    if parts is not None:
        names = ("n_heads", "n_keys", "D", "DV", "BLOCK_D", "BLOCK_DV", "BLOCK_SIZE", "GROUP")
        own = {name: every[name] for name in (*names, "PRECISION")}
        kernel = _selected_attention_backward_sum_kernel
        launches.append(Launch(kernel, pairs * call.blocks * tiles, {**own, **both}))
    return launches
