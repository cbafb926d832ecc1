"""hk.compressed_attention: checks the arguments, states the call as attention over a key range."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import autocast, check_flag, check_int
from hierkernels.key_range import KeyRange
from hierkernels.ops.attention import api as attention
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.compressed_attention import reference
from hierkernels.ops.compressed_attention.call import CompressedCall


def make_call(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    *,
    stride: int,
    first_end: int,
    num_memory: int = 0,
    strict: bool = False,
    is_causal: bool = True,
    query_offset: int = 0,
    scale: float | None = None,
) -> CompressedCall:
    """Checks the arguments of hk.compressed_attention and returns them in canonical form."""
    stride = check_int("stride", stride, 1)
    first_end = check_int("first_end", first_end, 0)
    num_memory = check_int("num_memory", num_memory, 0)
    query_offset = check_int("query_offset", query_offset, 0)
    strict, is_causal = check_flag("strict", strict), check_flag("is_causal", is_causal)
    # Positions are counted from the first query.
    key_range = KeyRange.compressed(first_end - query_offset, stride, num_memory, strict)
    call = attention.make_call(
        q, k_cmp, v_cmp, scale=scale, key_range=key_range if is_causal else None,
        names=("k_cmp", "v_cmp"),
    )  # fmt: skip
    if num_memory > k_cmp.shape[2]:
        raise ValueError(
            f"num_memory must be at most the tokens of k_cmp ({k_cmp.shape[2]}), got {num_memory}"
        )
    return CompressedCall(call, stride, first_end, num_memory, strict, is_causal, query_offset)


def run(call: CompressedCall, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend)
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        return reference.compressed_attention(call)
    return attention.run(call.attention, name or None)


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    *,
    stride: int,
    first_end: int,
    num_memory: int = 0,
    strict: bool = False,
    is_causal: bool = True,
    query_offset: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over compressed tokens, each of which stands for a window of tokens.

    Compressed token w stands for a window that ends at position first_end + w stride. Query i, at
    position i + query_offset, sees the memory tokens and those whose window has ended.

    Args:
        q: queries (B, Hq, Nq, D): float32, bfloat16, float16 or float64, any strides.
        k_cmp: keys (B, Hkv, M + W, D), M memory tokens, then W compressed ones; query head h uses
            key/value head h // (Hq / Hkv). W may be 0.
        v_cmp: values (B, Hkv, M + W, Dv).
        stride: tokens from the end of a window to that of the next, at least 1.
        first_end: the position of the last token of the first window: block size - 1 if windows
            start with the sequence, stride - 1 if the first is padded on the left.
        num_memory: M, the keys at the front that every query sees.
        strict: a window must have ended before the query's position, not at it.
        is_causal: False: every query sees every key.
        query_offset: the position of the first query; in decoding, the tokens before it.
        scale: of the scores; None = D ** -0.5.
        return_lse: also return the log-sum-exp of the scores (B, Hq, Nq), float32, differentiable.
        backend: "cuda", "triton", "cpu" or "reference"; None = the fastest supported.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of q, or (out, lse). A query that sees no key has out 0,
        lse -inf and gradient 0. Gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (not strict):
        end = first_end + stride * arange(-M, W); i = arange(Nq)[:, None] + query_offset
        mask = (arange(-M, W) < 0) | (end <= i)
        F.scaled_dot_product_attention(q, k_cmp, v_cmp, attn_mask=mask)

    Source: Yuan et al., "Native Sparse Attention" (2025), section 3.3.1.
    """
    q, k_cmp, v_cmp = autocast(q, k_cmp, v_cmp)
    call = make_call(
        q, k_cmp, v_cmp, stride=stride, first_end=first_end, num_memory=num_memory, strict=strict,
        is_causal=is_causal, query_offset=query_offset, scale=scale,
    )  # fmt: skip
    check_flag("return_lse", return_lse)
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def problem(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    *,
    return_lse: bool = False,
    **options: Any,
) -> AttentionCall:
    """The canonical form of a call, as hk.compressed_attention hands it to attention's backends."""
    check_flag("return_lse", return_lse)
    return make_call(*autocast(q, k_cmp, v_cmp), **options).attention
