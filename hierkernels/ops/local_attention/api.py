"""hk.local_attention: checks the arguments and states the call as attention over a key range."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import autocast, check_flag, check_int
from hierkernels.key_range import KeyRange
from hierkernels.ops.attention import api as attention
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.local_attention import reference
from hierkernels.ops.local_attention.call import LocalCall
from hierkernels.ops.local_attention.zero_lookback import merge_zero_keys


def _check_bias(bias: Any, q: torch.Tensor, width: int, buckets: int) -> torch.Tensor:
    """bias (1, Hq, w, slots)."""
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"attn_bias must be a torch.Tensor, got {type(bias).__name__}")
    if bias.dtype not in attention.FLOATS:
        raise TypeError(
            f"attn_bias must be float32, bfloat16, float16 or float64, got {bias.dtype}"
        )
    shape = (q.shape[1], width, buckets * width)
    if tuple(bias.shape) != shape:
        raise ValueError(
            "attn_bias must have shape (heads, window_size, (look_backward + 1 + look_forward) * "
            f"window_size) = {shape}, got {tuple(bias.shape)}"
        )
    if bias.device != q.device:
        raise ValueError(f"attn_bias must be on the device of q ({q.device}), got {bias.device}")
    return bias[None]


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_size: int,
    *,
    is_causal: bool = True,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    zero_lookback: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    scale: float | None = None,
) -> LocalCall:
    """Checks the arguments of hk.local_attention and returns them in canonical form."""
    width = check_int("window_size", window_size, 1)
    is_causal = check_flag("is_causal", is_causal)
    exact_window = check_flag("exact_window", exact_window)
    zero_lookback = check_flag("zero_lookback", zero_lookback)
    back = check_int("look_backward", look_backward, 0)
    if look_forward is None:
        look_forward = 0 if is_causal else 1
    forward = check_int("look_forward", look_forward, 0)
    if is_causal and forward:
        raise ValueError(f"look_forward must be 0 or None with is_causal=True, got {forward}")
    call = attention.make_call(
        q, k, v, key_padding_mask=key_padding_mask, dropout_p=dropout_p,
        dropout_seed=dropout_seed, scale=scale,
        key_range=KeyRange.bucketed(0, width, back, forward, is_causal, exact_window),
    )  # fmt: skip
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the tokens of q ({q.shape[2]}), got {k.shape[2]}")
    if attn_bias is not None:
        call.bias = _check_bias(attn_bias, q, width, back + 1 + forward)
        call.bias_width, call.bias_before = width, back * width
    return LocalCall(call, width, back, forward, is_causal, exact_window, zero_lookback)


def run(call: LocalCall, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend)
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        return reference.local_attention(call)
    out, lse = attention.run(call.attention, name or None)
    if call.zero_lookback and call.before:
        return merge_zero_keys(call, out, lse)
    return out, lse


def local_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_size: int,
    *,
    is_causal: bool = True,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    zero_lookback: bool = False,
    key_padding_mask: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention within windows: buckets of w tokens see themselves and those around them.

    Query i, in bucket c = i // w, sees the keys (c - look_backward) w <= j < (c + 1 + look_forward)
    w that are in the sequence, j <= i alone if causal. Time and memory are linear in N, and no
    key is copied.

    Args:
        q: queries (B, Hq, N, D): float32, bfloat16, float16 or float64, any strides, any length.
        k: keys (B, Hkv, N, D); query head h uses key/value head h // (Hq / Hkv).
        v: values (B, Hkv, N, Dv).
        window_size: w, tokens of a bucket, at least 1.
        is_causal: no query sees a later key.
        look_backward: buckets before its own that a query sees.
        look_forward: buckets after its own; None = 0 if causal, else 1. Causal allows 0 alone.
        exact_window: the reach is counted from the query instead of from its bucket: the keys
            i - look_backward w <= j <= i + look_forward w.
        zero_lookback: the positions before the sequence that the look-back reaches count as zero
            keys with zero values: they take part in the softmax (with the bias of their slots).
        key_padding_mask: bool (B, N), True = real token.
        attn_bias: float (Hq, w, slots), slots = (look_backward + 1 + look_forward) w, added to the
            scaled scores: query i and key j take row i % w and slot j - (c - look_backward) w.
            Differentiable.
        dropout_p, dropout_seed, scale: as in hk.attention.
        return_lse: also return the log-sum-exp of the scores (B, Hq, N), float32, differentiable.
        backend: "cuda", "triton", "cpu" or "reference"; None = the fastest supported.

    Returns:
        out (B, Hq, N, Dv) in the dtype of q, or (out, lse). A query that sees no key has out 0,
        lse -inf and gradient 0. Gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (causal, no bias):
        i, j = arange(N)[:, None], arange(N); first = i if exact_window else i // w * w
        mask = (first - look_backward * w <= j) & (j <= i)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    Source: the package local-attention, after Roy et al., "Efficient Content-Based Sparse
    Attention with Routing Transformers" (2021), section 4.
    """
    q, k, v = autocast(q, k, v)
    call = make_call(
        q, k, v, window_size, is_causal=is_causal,
        look_backward=look_backward, look_forward=look_forward, exact_window=exact_window,
        zero_lookback=zero_lookback, key_padding_mask=key_padding_mask, attn_bias=attn_bias,
        dropout_p=dropout_p, dropout_seed=dropout_seed, scale=scale,
    )  # fmt: skip
    check_flag("return_lse", return_lse)
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window_size: int,
    *,
    return_lse: bool = False,
    **options: Any,
) -> AttentionCall:
    """The canonical form of a call, as hk.local_attention hands it to the backends of attention."""
    check_flag("return_lse", return_lse)
    q, k, v = autocast(q, k, v)
    return make_call(q, k, v, window_size, **options).attention
