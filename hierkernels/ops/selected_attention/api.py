"""hk.selected_attention: checks the arguments, makes them canonical and calls the operator."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import autocast, check_flag, check_int
from hierkernels.eager import is_unwatched
from hierkernels.ops.attention import api as attention
from hierkernels.ops.selected_attention import reference
from hierkernels.ops.selected_attention import schema as schema  # registers the operators
from hierkernels.ops.selected_attention.call import SelectedCall


def _check_indices(indices: Any, q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"block_indices must be a torch.Tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_indices must be int32 or int64, got {indices.dtype}")
    B, Hq, Nq, _ = q.shape
    shape = tuple(indices.shape)
    if len(shape) != 4 or shape[0] != B or shape[1] not in (kv_heads, Hq) or shape[2] != Nq:
        heads = str(Hq) if kv_heads == Hq else f"{kv_heads} or {Hq}"
        raise ValueError(
            "block_indices must have shape (batch, key/value or query heads, queries, n) = "
            f"({B}, {heads}, {Nq}, n), got {shape}"
        )
    if indices.device != q.device:
        raise ValueError(
            f"block_indices must be on the device of q ({q.device}), got {indices.device}"
        )
    return indices


def _check_weights(weights: Any, indices: torch.Tensor) -> torch.Tensor:
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"block_weights must be a torch.Tensor, got {type(weights).__name__}")
    if weights.dtype not in attention.FLOATS:
        raise TypeError(
            f"block_weights must be float32, bfloat16, float16 or float64, got {weights.dtype}"
        )
    if weights.shape != indices.shape:
        raise ValueError(
            f"block_weights must have the shape of block_indices {tuple(indices.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    if weights.device != indices.device:
        raise ValueError(
            f"block_weights must be on the device of q ({indices.device}), got {weights.device}"
        )
    return weights


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int,
    block_weights: torch.Tensor | None = None,
    include_own_block: bool = False,
    is_causal: bool = True,
    scale: float | None = None,
) -> SelectedCall:
    """Checks the arguments of hk.selected_attention and returns them in canonical form."""
    dense = attention.make_call(q, k, v, scale=scale)
    indices = _check_indices(block_indices, q, k.shape[1])
    if block_weights is not None:
        block_weights = _check_weights(block_weights, indices)
    return SelectedCall(
        dense.q, dense.k, dense.v, indices, block_weights,
        check_int("block_size", block_size, 1),
        check_flag("include_own_block", include_own_block),
        check_flag("is_causal", is_causal),
        dense.scale,
    )  # fmt: skip


def run(
    call: SelectedCall, backend: str | None, check_indices: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend)
    check = call.q.is_cpu if check_indices is None else check_indices
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        # Values can be looked at where they are values: not in a compiler's or vmap's trace.
        if check and (check_indices or is_unwatched((call.indices,))):
            schema.check_values(call)
        return reference.selected_attention(call)
    return schema.selected_attention_forward(call, check, name)


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int,
    block_weights: torch.Tensor | None = None,
    include_own_block: bool = False,
    is_causal: bool = True,
    check_indices: bool | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every query over the blocks of keys that are selected for it.

    Block j holds the keys j S <= key < min((j + 1) S, Nk), S = block_size; there are
    J = ceil(Nk / S). Query i sits at position p = i + Nk - Nq. The time grows with Nq n S.

    Args:
        q: queries (B, Hq, Nq, D): float32, bfloat16, float16 or float64, any strides.
        k: keys (B, Hkv, Nk, D); query head h uses key/value head h // (Hq / Hkv).
        v: values (B, Hkv, Nk, Dv).
        block_indices: int32 or int64, (B, Hkv, Nq, n) for a choice that the query heads of a
            key/value head share, or (B, Hq, Nq, n) for one of each query head; in any order. -1
            stands for no block, anywhere; a block named twice counts once.
        block_size: S, keys of a block, at least 1.
        block_weights: float, the shape of block_indices: the scaled scores of a block's keys are
            multiplied by its weight (the first one, if the block is named twice). Differentiable.
        include_own_block: the block of p is selected too, with weight 1 unless it is named.
        is_causal: query i sees keys up to p alone.
        check_indices: whether an index outside [-1, J) is a ValueError; None = for CPU tensors
            (outside of compilers' and transforms' traces). Unchecked, it counts as -1.
        scale: of the scores; None = D ** -0.5.
        return_lse: also return the log-sum-exp of the scores (B, Hq, Nq), float32, differentiable.
        backend: "cuda", "triton", "cpu" or "reference"; None = the fastest supported.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of q, or (out, lse). A query that sees no key has out 0,
        lse -inf and gradient 0. Gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (n > 0, no weights, not the own block):
        block = torch.arange(Nk) // block_size
        chosen = (block_indices[..., None] == block).any(-2)  # (B, Hkv or Hq, Nq, Nk)
        chosen = chosen.repeat_interleave(Hq // chosen.shape[1], 1)
        hk.attention(q, k, v, is_causal=True, attn_mask=chosen)

    Source: Yuan et al., "Native Sparse Attention" (2025), 3.3.2.
    """
    if check_indices is not None:
        check_flag("check_indices", check_indices)
    q, k, v = autocast(q, k, v)
    call = make_call(
        q, k, v, block_indices, block_size=block_size, block_weights=block_weights,
        include_own_block=include_own_block, is_causal=is_causal, scale=scale,
    )  # fmt: skip
    check_flag("return_lse", return_lse)
    out, lse = run(call, backend, check_indices)
    return (out, lse) if return_lse else out


def problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    return_lse: bool = False,
    check_indices: bool | None = None,
    **options: Any,
) -> SelectedCall:
    """The canonical form of a call, as hk.selected_attention makes it."""
    check_flag("return_lse", return_lse)
    q, k, v = autocast(q, k, v)
    return make_call(q, k, v, block_indices, **options)
