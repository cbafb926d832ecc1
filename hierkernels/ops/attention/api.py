"""hk.attention: checks the arguments, puts them in canonical form and calls the operator."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import autocast, check_flag
from hierkernels.key_range import KeyRange
from hierkernels.ops.attention import reference
from hierkernels.ops.attention import schema as schema  # registers the operators
from hierkernels.ops.attention.call import AttentionCall, unit_stride

_NUMBERS = (int, float, numbers.Real, torch.SymInt, torch.SymFloat)
_UNLIMITED = 2**62  # a window this wide has no end: beyond it, bounds would overflow 64 bits
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_name: str, value_name: str
) -> tuple[int, int, int, int]:
    """The shape of the scores, (B, Hq, Nq, Nk); errors call k and v by the names given."""
    for name, t in (("q", q), (key_name, k), (value_name, v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, channels), "
                f"got shape {tuple(t.shape)}"
            )
    # Each attribute of a tensor is read once: a small call is made of microseconds.
    dtype, device = q.dtype, q.device
    (B, Hq, Nq, D), (Bk, Hkv, Nk, Dk), (Bv, Hv, Nv, Dv) = q.shape, k.shape, v.shape
    if dtype not in FLOATS:
        raise TypeError(f"q must be float32, bfloat16, float16 or float64, got {dtype}")
    for name, t, batch in ((key_name, k, Bk), (value_name, v, Bv)):
        if t.dtype != dtype:
            raise TypeError(f"{name} must have the dtype of q ({dtype}), got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name} must be on the device of q ({device}), got {t.device}")
        if batch != B:
            raise ValueError(f"{name} must have the batch size of q ({B}), got {batch}")
    if D == 0:
        raise ValueError(f"q must have at least one channel, got shape {tuple(q.shape)}")
    if Dk != D:
        raise ValueError(f"{key_name} must have the channels of q ({D}), got {Dk}")
    if Dv == 0:
        raise ValueError(f"{value_name} must have at least one channel, got shape {tuple(v.shape)}")
    if Hv != Hkv or Nv != Nk:
        raise ValueError(
            f"{value_name} must have the heads and tokens of {key_name} {(Hkv, Nk)}, got {(Hv, Nv)}"
        )
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(
            "q must have a multiple of the heads of "
            f"{' and '.join(dict.fromkeys((key_name, value_name)))}, got {Hq} heads for {Hkv}"
        )
    return B, Hq, Nq, Nk


def _check_broadcast(
    name: str, t: Any, full: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """t with four dimensions, each 1 or that of the scores."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.device != device:
        raise ValueError(f"{name} must be on the device of q ({device}), got {t.device}")
    shape = tuple(t.shape)
    missing = 4 - len(shape)
    if missing < 0 or any(
        [size not in (1, want) for size, want in zip(shape, full[missing:], strict=True)]
    ):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, queries, keys) = {full}, got shape {shape}"
        )
    return t.reshape((1,) * missing + shape) if missing else t


def _check_window(window_size: Any) -> tuple[int | None, int | None]:
    if window_size is None:
        return None, None
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right) or None, got {window_size!r}")
    for side in window_size:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise TypeError(f"window_size must hold ints or None, got {window_size!r}")
        if side is not None and side < 0:
            raise ValueError(
                f"window_size must not be negative (None = unlimited), got {window_size!r}"
            )
    left, right = (None if side is None or side >= _UNLIMITED else side for side in window_size)
    return left, right


def _check_seed(seed: Any, q: torch.Tensor) -> torch.Tensor:
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=q.device)
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != q.device:
            raise ValueError(
                "dropout_seed must be an int or one int64 element on the device of q "
                f"({q.device}), got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )
        return seed.reshape(())
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"dropout_seed must be an int or an int64 tensor, got {type(seed).__name__}"
        )
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"dropout_seed must fit 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=q.device)


def check_number(name: str, value: Any) -> None:
    """TypeError if value is no number."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    key_range: KeyRange | None = None,
    names: tuple[str, str] = ("k", "v"),
) -> AttentionCall:
    """Checks the arguments of hk.attention and returns them in canonical form.

    key_range replaces is_causal and window_size; names are those of k and v in errors.
    """
    B, _, Nq, Nk = full = check_qkv(q, k, v, *names)
    left, right = _check_window(window_size)
    if key_range is not None:
        key_range = key_range.canonical()
    else:  # these are canonical
        if check_flag("is_causal", is_causal):
            right = 0
        key_range = (
            KeyRange.full(Nq, Nk)
            if left is None and right is None
            else KeyRange.window(Nq, Nk, left, right)
        )
    if attn_bias is not None:
        attn_bias = _check_broadcast("attn_bias", attn_bias, full, q.device)
        if attn_bias.dtype not in FLOATS:
            raise TypeError(
                "attn_bias must be a float tensor (use attn_mask for booleans), "
                f"got {attn_bias.dtype}"
            )
    if attn_mask is not None:
        attn_mask = _check_broadcast("attn_mask", attn_mask, full, q.device)
        if attn_mask.dtype != torch.bool:
            raise TypeError(f"attn_mask must be bool (True = may attend), got {attn_mask.dtype}")
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, torch.Tensor):
            raise TypeError(
                f"key_padding_mask must be a torch.Tensor, got {type(key_padding_mask).__name__}"
            )
        if tuple(key_padding_mask.shape) != (B, Nk):
            raise ValueError(
                f"key_padding_mask must have shape (batch, keys) = {(B, Nk)}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(
                f"key_padding_mask must be bool (True = real token), got {key_padding_mask.dtype}"
            )
        if key_padding_mask.device != q.device:
            raise ValueError(
                f"key_padding_mask must be on the device of q, got {key_padding_mask.device}"
            )
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if dropout_p or dropout_seed is not None:
        dropout_seed = _check_seed(dropout_seed, q)
    if softcap is not None:
        check_number("softcap", softcap)
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        check_number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")
    return AttentionCall(
        unit_stride(q), unit_stride(k), unit_stride(v), attn_bias, attn_mask, key_padding_mask,
        dropout_seed if dropout_p else None,
        key_range, scale, softcap or 0.0, dropout_p,
    )  # fmt: skip


def run(call: AttentionCall, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend)
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        return reference.attention(call)
    return schema.attention_forward(call, name)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    window_size: tuple[int | None, int | None] | None = None,
    attn_bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention, softmax(scale * q k^T + bias) v over the visible keys.

    Args:
        q: queries (B, Hq, Nq, D): float32, bfloat16, float16 or float64, any strides.
        k: keys (B, Hkv, Nk, D); query head h uses key/value head h // (Hq / Hkv).
        v: values (B, Hkv, Nk, Dv).
        is_causal: query i sees keys up to i + Nk - Nq (aligned at the last token).
        window_size: (left, right): the keys from `left` before to `right` after that position, both
            inclusive; None on a side = unlimited. With is_causal, right is 0.
        attn_bias: float, broadcastable to (B, Hq, Nq, Nk), added to the scaled scores;
            differentiable, its gradient is summed over the broadcast dimensions. For masks made
            of numbers see below.
        attn_mask: bool, broadcastable to (B, Hq, Nq, Nk), True = may attend.
        key_padding_mask: bool (B, Nk), True = real token.
        dropout_p: probability, in [0, 1), that an attention weight is dropped.
        dropout_seed: int or int64 tensor; None draws one from PyTorch's generator. The mask depends
            only on (seed, batch, head, query, key), so every backend drops the same weights.
        softcap: c > 0 replaces the scaled scores s by c * tanh(s / c), before the bias.
        scale: of the scores; None = D ** -0.5.
        return_lse: also return the log-sum-exp of the scores (B, Hq, Nq), float32, differentiable.
        backend: "cuda", "triton", "cpu" or "reference"; None = the fastest supported.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of q, or (out, lse). A query that sees no key has out 0,
        lse -inf and gradient 0. Gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Masks made of numbers:
        -inf and the torch.finfo(...).min of float32 or bfloat16 (for float64 inputs: of float64)
        hide a key as attn_mask does. So a query all of whose keys are hidden has out 0, where an
        eager softmax gives NaN for -inf and averages all values for the least number. Every other
        number is an ordinary score, -1e9 and the least float16 too: it hides a key beside visible
        ones, but a query that has no others averages the values, and rounding spoils its gradient
        (which may be NaN with Triton and numbers beyond -1e9). Prefer attn_mask.

    Equivalent to (no window, dropout or softcap):
        p = softmax(q @ k.mT * scale + attn_bias masked to -inf, dim=-1); out = p @ v

    Source: Dao et al., "FlashAttention" (2022), for the algorithm.
    """
    q, k, v = autocast(q, k, v)
    call = make_call(
        q, k, v, is_causal=is_causal, window_size=window_size, attn_bias=attn_bias,
        attn_mask=attn_mask, key_padding_mask=key_padding_mask, dropout_p=dropout_p,
        dropout_seed=dropout_seed, softcap=softcap, scale=scale,
    )  # fmt: skip
    check_flag("return_lse", return_lse)
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool = False, **options: Any
) -> AttentionCall:
    """The canonical form of a call, as hk.attention makes it."""
    check_flag("return_lse", return_lse)
    return make_call(*autocast(q, k, v), **options)
