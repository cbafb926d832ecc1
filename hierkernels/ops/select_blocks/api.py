"""hk.select_blocks: checks the arguments, puts them in canonical form and calls the operator."""

from __future__ import annotations

import math
from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import autocast, check_flag, check_int
from hierkernels.ops.attention.api import FLOATS, check_number, check_qkv
from hierkernels.ops.attention.call import unit_stride
from hierkernels.ops.select_blocks import reference, schema
from hierkernels.ops.select_blocks.call import SelectCall
from hierkernels.ops.select_blocks.probabilities import probabilities

SCORINGS = ("probability", "logit")


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} must be a multiple of {divisor_name} ({divisor}), got {value}")


def _check_lse(lse: Any, q: torch.Tensor) -> torch.Tensor:
    if lse is None:
        raise ValueError(
            "lse must be given with scoring='probability': the second result of "
            "compressed_attention(..., return_lse=True), got None"
        )
    if not isinstance(lse, torch.Tensor):
        raise TypeError(f"lse must be a torch.Tensor, got {type(lse).__name__}")
    if lse.dtype not in FLOATS:
        raise TypeError(f"lse must be float32, bfloat16, float16 or float64, got {lse.dtype}")
    if lse.shape != q.shape[:3]:
        raise ValueError(
            f"lse must have shape (batch, heads, queries) = {tuple(q.shape[:3])}, "
            f"got {tuple(lse.shape)}"
        )
    if lse.device != q.device:
        raise ValueError(f"lse must be on the device of q ({q.device}), got {lse.device}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return lse.detach().to(dtype).contiguous()


def _check_probability_scoring(
    q: torch.Tensor, lse: Any, window_size: Any, stride: int, first_end: int, forced: int, n: int
) -> tuple[torch.Tensor, int]:
    """(lse, window_size)."""
    if window_size is None:
        raise ValueError("window_size must be given with scoring='probability', got None")
    window_size = check_int("window_size", window_size, 1)
    _check_multiple("window_size", window_size, "stride", stride)
    if (first_end + 1 - window_size) % stride:
        raise ValueError(
            "first_end must be such that windows start at multiples of stride: first_end + 1 - "
            f"window_size is no multiple of {stride}, got {first_end} with windows of {window_size}"
        )
    if forced > n:
        raise ValueError(
            f"num_initial + num_local must be at most num_selected ({n}), got {forced}"
        )
    return _check_lse(lse, q), window_size


def make_call(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    *,
    num_selected: int,
    block_size: int,
    stride: int,
    first_end: int,
    scoring: str = "probability",
    window_size: int | None = None,
    lse: torch.Tensor | None = None,
    strict: bool = False,
    is_causal: bool = True,
    num_initial: int = 0,
    num_local: int = 0,
    exclude_own_block: bool | None = None,
    query_offset: int = 0,
    num_keys: int | None = None,
    shared: bool = True,
    scale: float | None = None,
) -> SelectCall:
    """Checks the arguments of hk.select_blocks and returns them in canonical form."""
    _, _, Nq, W = check_qkv(q, k_cmp, k_cmp, "k_cmp", "k_cmp")
    n = check_int("num_selected", num_selected, 0)
    stride = check_int("stride", stride, 1)
    block_size = check_int("block_size", block_size, 1)
    _check_multiple("block_size", block_size, "stride", stride)
    first_end = check_int("first_end", first_end, 0)
    query_offset = check_int("query_offset", query_offset, 0)
    num_initial = check_int("num_initial", num_initial, 0)
    num_local = check_int("num_local", num_local, 0)
    strict, is_causal = check_flag("strict", strict), check_flag("is_causal", is_causal)
    shared = check_flag("shared", shared)
    if num_keys is None:
        num_keys = Nq + query_offset
        if W:
            num_keys = max(num_keys, first_end + (W - 1) * stride + 1)
    else:
        num_keys = check_int("num_keys", num_keys, 0, 2**31 - 1)
    if not isinstance(scoring, str) or scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if scoring == "probability":
        lse, window_size = _check_probability_scoring(
            q, lse, window_size, stride, first_end, num_initial + num_local, n
        )
    else:
        for name, value in (("lse", lse), ("window_size", window_size)):
            if value is not None:
                raise ValueError(f"{name} must be None with scoring='logit', got {value!r}")
        if num_initial or num_local:
            raise ValueError(
                "num_initial and num_local must be 0 with scoring='logit', "
                f"got {num_initial} and {num_local}"
            )
        window_size = 0
    if exclude_own_block is None:
        exclude_own_block = scoring == "logit"
    check_flag("exclude_own_block", exclude_own_block)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        check_number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")
    return SelectCall(
        unit_stride(q.detach()), unit_stride(k_cmp.detach()), lse, n, block_size, stride,
        first_end, window_size, strict, is_causal, num_initial, num_local, exclude_own_block,
        query_offset, num_keys, shared, scale,
    )  # fmt: skip


def run(call: SelectCall, backend: str | None) -> torch.Tensor:
    """indices of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend)
    if name == "reference":
        return reference.forward(call)
    return schema.select_blocks(call, name)


def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    *,
    num_selected: int,
    block_size: int,
    stride: int,
    first_end: int,
    scoring: str = "probability",
    window_size: int | None = None,
    lse: torch.Tensor | None = None,
    strict: bool = False,
    is_causal: bool = True,
    num_initial: int = 0,
    num_local: int = 0,
    exclude_own_block: bool | None = None,
    query_offset: int = 0,
    num_keys: int | None = None,
    shared: bool = True,
    scale: float | None = None,
    return_probabilities: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """For each query, the n blocks of keys whose compressed tokens it scores highest.

    Block j holds the keys j S <= position < (j + 1) S. Scores are made tile by tile and reduced to
    the best n at once: no kernel ever stores an (Nq x W) tensor. Equal scores: the
    lower block first. A score that is NaN counts as the lowest.

    scoring="probability": the score is the sum, over the group's heads and the windows, of the
        attention probability exp(scale q . k_cmp[w] - lse), once for each chunk of `stride` tokens
        that window w shares with the block (windows 32, stride 16, blocks 64: weights 1 2 2 2 1).
        Blocks that start beyond the query's position are no candidates, all others are, also with
        score 0. num_initial and num_local blocks are chosen first.
    scoring="logit": the score is scale * (mean over the group's q) . (mean over k_cmp[w] of the
        block's r = S / stride windows j r <= w < (j + 1) r), the mean of the logits. Blocks all of
        whose windows are visible are candidates. A softmax over the candidates and one logit of
        -1000, for no block, gives p; blocks with p <= 1e-10 are not chosen.

    Args:
        q: queries (B, Hq, Nq, D): float32, bfloat16, float16 or float64, any strides. Query i has
            the position i + query_offset.
        k_cmp: compressed keys (B, Hkv, W, D), without memory tokens; query head h uses key head
            h // (Hq / Hkv). Window w ends at the position first_end + w stride, and query i sees
            it iff that is at (with strict: before) its own position.
        num_selected: n, blocks to choose; 0 is allowed.
        block_size: S, tokens of a block, a multiple of stride.
        stride: tokens from the end of a window to that of the next.
        first_end: the position of the last token of the first window.
        window_size: tokens of a window, a multiple of stride; windows start at multiples of it
            (the part of a window before position 0, padding, belongs to no block). Scoring by
            probability needs it, by logit does not take it.
        lse: (B, Hq, Nq), the log-sum-exp that compressed_attention returns. As window_size.
        strict, is_causal: as in compressed_attention; is_causal=False makes all blocks candidates.
        num_initial: the first so many blocks are always chosen, if they are candidates.
        num_local: so are the own block, position // S, and those before it, so many in all.
        exclude_own_block: the own block is no candidate, even if it is local or initial. None:
            so for logits, not for probabilities.
        query_offset: the position of the first query; in decoding, the tokens before it.
        num_keys: the tokens that blocks are made of, ceil(num_keys / S) blocks; None: as many as
            the last query's position or the last window's end need.
        shared: the heads of a group choose together; False: each query head chooses for itself.
        scale: of the scores; None = D ** -0.5.
        return_probabilities: also return p, for scoring="logit".
        backend: "cuda", "triton", "cpu" or "reference"; None = the fastest supported.

    Returns:
        indices (B, Hkv, Nq, n) int32, (B, Hq, Nq, n) if not shared: ascending, then -1 where there
        are fewer. No gradient. Or (indices, p): p of the same shape, float32 (float64 for float64),
        0 where there is no index; differentiable with respect to q and k_cmp.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (probability, one head, windows = stride = block):
        p = exp(q @ k_cmp.mT * scale - lse[..., None]) masked to 0; p.topk(n).indices.sort().values

    Source: Yuan et al., "Native Sparse Attention" (2025), section 3.3.2, equations 8 to 10; scoring
        by logits is that of the package native-sparse-attention-pytorch.
    """
    q, k_cmp = autocast(q, k_cmp)
    call = make_call(
        q, k_cmp, num_selected=num_selected, block_size=block_size, stride=stride,
        first_end=first_end, scoring=scoring, window_size=window_size, lse=lse, strict=strict,
        is_causal=is_causal, num_initial=num_initial, num_local=num_local,
        exclude_own_block=exclude_own_block, query_offset=query_offset, num_keys=num_keys,
        shared=shared, scale=scale,
    )  # fmt: skip
    check_flag("return_probabilities", return_probabilities)
    if return_probabilities and call.lse is not None:
        raise ValueError("return_probabilities must be False with scoring='probability', got True")
    indices = run(call, backend)
    if not return_probabilities:
        return indices
    with torch.autocast(q.device.type, enabled=False):  # it would round what is made float32
        return indices, probabilities(call, q, k_cmp, indices, backend)


def problem(
    q: torch.Tensor, k_cmp: torch.Tensor, *, return_probabilities: bool = False, **options: Any
) -> SelectCall:
    """The canonical form of a call, as hk.select_blocks makes it."""
    return make_call(*autocast(q, k_cmp), **options)
