"""hk.native_sparse_attention: checks the arguments, runs the branches, adds them up."""

from __future__ import annotations

from typing import Any

import torch

from hierkernels import dispatch
from hierkernels.arguments import autocast, check_flag, check_int
from hierkernels.ops.attention import api as attention
from hierkernels.ops.native_sparse_attention import reference
from hierkernels.ops.native_sparse_attention.branches import branches
from hierkernels.ops.native_sparse_attention.call import PRESETS, NsaCall
from hierkernels.ops.native_sparse_attention.gated_sum import gated_sum
from hierkernels.ops.selected_attention import api as selected_attention
from hierkernels.ops.selected_attention.call import SelectedCall


def _check_gates(gates: Any, q: torch.Tensor) -> torch.Tensor:
    if not isinstance(gates, torch.Tensor):
        raise TypeError(f"gates must be a torch.Tensor, got {type(gates).__name__}")
    if gates.dtype not in attention.FLOATS:
        raise TypeError(f"gates must be float32, bfloat16, float16 or float64, got {gates.dtype}")
    shape = (*q.shape[:3], 3)
    if tuple(gates.shape) != shape:
        raise ValueError(
            f"gates must have shape (batch, heads, queries, 3) = {shape}, got {tuple(gates.shape)}"
        )
    if gates.device != q.device:
        raise ValueError(f"gates must be on the device of q ({q.device}), got {gates.device}")
    return gates


def _check_like(name: str, t: torch.Tensor, like_name: str, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name} {tuple(like.shape)}, got {tuple(t.shape)}"
        )
    if t.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name} ({like.dtype}), got {t.dtype}")
    if t.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name} ({like.device}), got {t.device}"
        )
    return t


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    gates: torch.Tensor,
    *,
    preset: str,
    block_size: int,
    num_selected: int,
    window_size: int,
    stride: int,
    first_end: int,
    compression_window: int,
    q_cmp: torch.Tensor | None = None,
    k_window: torch.Tensor | None = None,
    v_window: torch.Tensor | None = None,
    num_memory: int = 0,
    use_diff_topk: bool = False,
    shared: bool = True,
    is_causal: bool = True,
    scale: float | None = None,
) -> NsaCall:
    """Checks what the operators of the branches do not check, and fills in the defaults."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    definition = PRESETS[preset]
    attention.make_call(q, k, v)
    attention.make_call(q, k_cmp, v_cmp, names=("k_cmp", "v_cmp"))
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q must have at most the tokens of k ({k.shape[2]}), the last ones, got {q.shape[2]}"
        )
    if v_cmp.shape[3] != v.shape[3]:
        raise ValueError(f"v_cmp must have the channels of v ({v.shape[3]}), got {v_cmp.shape[3]}")
    block_size = check_int("block_size", block_size, 1)
    stride = check_int("stride", stride, 1)
    if block_size % stride:
        raise ValueError(f"block_size must be a multiple of stride ({stride}), got {block_size}")
    compression_window = check_int("compression_window", compression_window, stride)
    forced = definition.num_initial + definition.num_local
    num_selected = check_int("num_selected", num_selected, forced)
    window_size = check_int("window_size", window_size, int(definition.own_in_window))
    is_causal = check_flag("is_causal", is_causal)
    use_diff_topk = check_flag("use_diff_topk", use_diff_topk)
    if preset == "paper" and use_diff_topk:
        raise ValueError('use_diff_topk must be False with preset="paper", got True')
    if preset == "paper" and not is_causal:
        raise ValueError('is_causal must be True with preset="paper", got False')
    for name, t, like_name, like in (
        ("q_cmp", q_cmp, "q", q), ("k_window", k_window, "k", k), ("v_window", v_window, "v", v),
    ):  # fmt: skip
        if t is not None:
            _check_like(name, t, like_name, like)
    return NsaCall(
        q, k, v,
        q if q_cmp is None else q_cmp, k_cmp, v_cmp,
        k if k_window is None else k_window, v if v_window is None else v_window,
        _check_gates(gates, q), definition, block_size, num_selected,
        window_size - definition.own_in_window, stride,
        check_int("first_end", first_end, 0), compression_window,
        check_int("num_memory", num_memory, 0), use_diff_topk, check_flag("shared", shared),
        is_causal, scale,
    )  # fmt: skip


def run(call: NsaCall, backend: str | None) -> torch.Tensor:
    """out of a call, on the backend that is asked for."""
    name = dispatch.requested_backend(backend)
    if name == "reference":  # plain PyTorch operations: differentiable any number of times
        return reference.native_sparse_attention(call)
    return gated_sum(call.gates, branches(call, name or None), name or None)


def native_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    gates: torch.Tensor,
    *,
    preset: str,
    block_size: int,
    num_selected: int,
    window_size: int,
    stride: int,
    first_end: int,
    compression_window: int,
    q_cmp: torch.Tensor | None = None,
    k_window: torch.Tensor | None = None,
    v_window: torch.Tensor | None = None,
    num_memory: int = 0,
    use_diff_topk: bool = False,
    shared: bool = True,
    is_causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention to compressed tokens, selected blocks and a window, added up by gates.

    out = gates[0] compressed + gates[1] selected + gates[2] window, each a softmax attention of its
    own: hk.compressed_attention over one token for each window of the past; hk.selected_attention
    over the blocks that hk.select_blocks finds by the scores of the compressed tokens; hk.attention
    over the newest tokens. The time grows with N (W + n S + window_size), W = N / stride.

    preset="paper": DeepSeek's definition. A compressed token is visible from its window's last
        token on; block scores are sums of probabilities over the overlapping windows and the
        group's heads; the first block and the last two are always selected, inside n; the window
        holds window_size tokens, the query's own included.
    preset="seed": that of native-sparse-attention-pytorch 0.2.3. A compressed token is visible
        after its window; block scores are softmaxed means of logits; the query's own block is
        attended to beside the n; the window holds window_size tokens and the query's own.

    Args:
        q: queries (B, Hq, Nq, D): float32, bfloat16, float16 or float64, any strides. Query i has
            the position i + Nk - Nq: in decoding, q holds the newest tokens alone.
        k, v: keys (B, Hkv, Nk, D) and values (B, Hkv, Nk, Dv); query head h uses key/value head
            h // (Hq / Hkv).
        k_cmp, v_cmp: (B, Hkv, M + W, D) and (B, Hkv, M + W, Dv), M memory tokens, which all queries
            see, and then a compressed token for each window.
        gates: float (B, Hq, Nq, 3), in the order compressed, selected, window.
        preset: "paper" or "seed".
        block_size: S, tokens of a block that may be selected, a multiple of stride.
        num_selected: n, blocks of a query; at least 3 with preset="paper".
        window_size: of the sliding window, see the presets.
        stride: d, tokens from the end of a compression window to that of the next.
        first_end: the position of the last token of the first one.
        compression_window: l, tokens of a compression window, at least stride; a multiple of it
            with preset="paper".
        q_cmp: the queries that meet the compressed keys, if other ones (without rotary positions).
        k_window, v_window: keys and values of the window, if other ones than k and v.
        num_memory: M.
        use_diff_topk: the scores of selected keys are multiplied by p + (1 - p).detach(), p the
            probability of their block, so that q_cmp and k_cmp get its gradient; "seed" only.
        shared: the heads of a group select together; False: each query head for itself.
        is_causal: False ("seed" only): all compressed tokens are visible, all blocks candidates,
            and the window reaches as far after the query.
        scale: of the scores; None = D ** -0.5.
        backend: "cuda", "triton", "cpu" or "reference", for all branches; None = the fastest
            supported, for each.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of q. A branch that sees no key adds 0. Gradients are
        bitwise repeatable; there is none through the choice of blocks.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, value, dtype or device.
        NotImplementedError: the backend asked for does not support the call; lists the reasons.

    Equivalent to (preset="seed"):
        compressed = hk.compressed_attention(q_cmp, k_cmp, v_cmp, stride=d, first_end=first_end,
            num_memory=M, strict=True)
        blocks = hk.select_blocks(q_cmp, k_cmp[:, :, M:], num_selected=n, block_size=S, stride=d,
            first_end=first_end, scoring="logit", strict=True)
        selected = hk.selected_attention(q, k, v, blocks, block_size=S, include_own_block=True)
        window = hk.attention(q, k, v, is_causal=True, window_size=(window_size, 0))
        (gates.unsqueeze(-2) * torch.stack((compressed, selected, window), -1)).sum(-1)

    Source: Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse
    Attention" (2025), section 3.
    """
    q, k, v, k_cmp, v_cmp, q_cmp, k_window, v_window = autocast(
        q, k, v, k_cmp, v_cmp, q_cmp, k_window, v_window
    )
    call = make_call(
        q, k, v, k_cmp, v_cmp, gates, preset=preset, block_size=block_size,
        num_selected=num_selected, window_size=window_size, stride=stride, first_end=first_end,
        compression_window=compression_window, q_cmp=q_cmp, k_window=k_window, v_window=v_window,
        num_memory=num_memory, use_diff_topk=use_diff_topk, shared=shared, is_causal=is_causal,
        scale=scale,
    )  # fmt: skip
    return run(call, backend)


def problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    gates: torch.Tensor,
    **options: Any,
) -> SelectedCall:
    """The canonical form of the selected branch, the largest part, with no block selected."""
    extra = (options.pop(name, None) for name in ("q_cmp", "k_window", "v_window"))
    q, k, v, k_cmp, v_cmp, q_cmp, k_window, v_window = autocast(q, k, v, k_cmp, v_cmp, *extra)
    call = make_call(
        q, k, v, k_cmp, v_cmp, gates, q_cmp=q_cmp, k_window=k_window, v_window=v_window, **options
    )
    shape = (q.shape[0], (k if call.shared else q).shape[1], q.shape[2], call.num_selected)
    none = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    return selected_attention.make_call(
        q, k, v, none, block_size=call.block_size, is_causal=call.is_causal, scale=call.scale,
        include_own_block=call.definition.own_block,
    )  # fmt: skip
