"""Plans the launches of one attention call: which kernels, which tiles, which packing.

A plan only looks at shapes, strides and dtypes. The backend runs it, the ahead-of-time compiler
(aot.py) compiles the very same plan for other devices from tensors without memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from hierkernels.ops.attention import triton_configs as configs
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.triton_backward import (
    _attention_backward_dkv_kernel,
    _attention_backward_dq_kernel,
)
from hierkernels.ops.attention.triton_bias_gradient import _attention_backward_dbias_kernel
from hierkernels.ops.attention.triton_forward import _attention_forward_kernel
from hierkernels.ops.attention.triton_short import (
    _attention_short_backward_kernel,
    _attention_short_forward_kernel,
)
from hierkernels.triton_common.key_range import range_arguments
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import LOG2E, padded, rows_stride

# Programs that keep a large device busy; fixed, so that results do not depend on the device.
_BUSY = 512
# From this many queries on, the heads of a group get tiles of their own.
_PACK_BELOW = 128


# ---- arguments ----


def _bytes(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.view(torch.uint8)


def _pair_form(t: torch.Tensor | None, pack: int) -> str:
    """How a bias or mask is read: a form of triton_scores.py, but for "slots"."""
    if t is None:
        return "none"
    return "keys" if t.shape[2] == 1 and (pack == 1 or t.shape[1] == 1) else "full"


def _pair_strides(t: torch.Tensor | None, call: AttentionCall) -> tuple[int, ...]:
    if t is None:
        return (0, 0, 0, 0)
    return t.expand(*call.q.shape[:3], call.k.shape[2]).stride()


def _bias_form(call: AttentionCall, pack: int) -> str:
    return "slots" if call.bias_width else _pair_form(call.bias, pack)


def _bias_strides(call: AttentionCall) -> tuple[int, ...]:
    if call.bias is None or not call.bias_width:
        return _pair_strides(call.bias, call)
    slots = (call.bias_width, call.bias_before, call.bias.shape[3])
    return 0, *call.bias.stride()[1:], *slots


def _every_kernel(call: AttentionCall, target: Target) -> dict[str, Any]:
    """The arguments that all kernels take."""
    D, Dv, Nq, Nk = call.q.shape[-1], call.v.shape[-1], call.q.shape[2], call.k.shape[2]
    key_range = range_arguments(call.key_range, Nq, Nk)
    assert key_range is not None  # supports() refuses those
    return {
        "q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v,
        "stride_q": rows_stride(call.q), "stride_k": rows_stride(call.k),
        "stride_v": rows_stride(call.v), "n_queries": Nq, "n_keys": Nk, **key_range,
        "D": D, "DV": Dv, "BLOCK_D": padded(D), "BLOCK_DV": padded(Dv), "GROUP": call.group,
        "PRECISION": target.precision,
    }  # fmt: skip


def _long_kernels(call: AttentionCall, target: Target, pack: int) -> dict[str, Any]:
    """The arguments that all but the short kernels take."""
    natural = call.q.dtype == torch.float32
    unit = 1.0 if natural else LOG2E.value
    return {
        **_every_kernel(call, target), "n_heads": call.q.shape[1],
        "bias_ptr": call.bias, "mask_ptr": _bytes(call.mask), "padding_ptr": _bytes(call.padding),
        "seed_ptr": call.seed, "stride_bias": _bias_strides(call),
        "stride_mask": _pair_strides(call.mask, call),
        "stride_padding": (0, 0) if call.padding is None else call.padding.stride(),
        "score_scale": call.scale / call.softcap if call.softcap else call.scale * unit,
        "softcap": call.softcap * unit, "NATURAL": natural,
        "dropout_threshold": min(int(call.dropout_p * 2**32), 0xFFFFFFFF),
        "dropout_scale": 1 / (1 - call.dropout_p),
        "BIAS": _bias_form(call, pack), "MASK": _pair_form(call.mask, pack),
        "PADDING": call.padding is not None, "SOFTCAP": bool(call.softcap),
        "DROPOUT": call.seed is not None,
        # A positive scale alone commutes with the maximum and can wait for the exponent.
        "FUSED": not natural and call.bias is None and not call.softcap and call.scale > 0,
    }  # fmt: skip


def _configuration(call: AttentionCall, target: Target, kernel: str, pack: int) -> configs.Config:
    pairs = {_bias_form(call, pack), _pair_form(call.mask, pack)}
    channels = max(call.q.shape[-1], call.v.shape[-1])
    demands = {
        "slots": "slots" in pairs,
        "pairs": bool(pairs & {"full", "slots"}) or call.seed is not None,
        "padded": channels != padded(channels),
        "packed": pack > 1,
        "stepped": max(bound.step for bound in call.key_range) > 1,
        "grouped": call.group > pack,
    }
    return configs.configuration(
        target.family,
        kernel,
        channels=channels,
        element_size=call.q.element_size(),
        n_rows=call.q.shape[2] * pack,
        demands=frozenset(name for name, holds in demands.items() if holds),
    )


def _tiles(config: configs.Config) -> dict[str, Any]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **config.compiler_options()}


def _pack(call: AttentionCall) -> int:
    """Heads that share a tile: the whole group when one head's queries would not fill it."""
    return call.group if call.q.shape[2] < _PACK_BELOW else 1


# ---- short sequences ----


def is_short(call: AttentionCall) -> bool:
    """Plain calls whose units (one key/value head each) fit a tile of the short kernels."""
    extras = (call.bias, call.mask, call.padding, call.seed)
    return (
        all(t is None for t in extras)
        and not call.softcap
        and max(call.q.shape[2] * call.group, call.k.shape[2]) <= configs.SHORT_ROWS
        and max(call.q.shape[-1], call.v.shape[-1]) <= configs.SHORT_CHANNELS
    )


def _short_launch(kernel: Any, call: AttentionCall, target: Target, **own: Any) -> Launch:
    B, Hkv, Nk, _ = call.k.shape
    units = configs.SHORT_ROWS // max(call.q.shape[2] * call.group, Nk)
    return Launch(kernel, triton.cdiv(B * Hkv, units), {
        **_every_kernel(call, target), **own, "score_scale": call.scale * LOG2E.value,
        "n_units": B * Hkv, "n_kv_heads": Hkv, "units_per_tile": units,
        **_tiles(configs.short_configuration(max(call.q.shape[-1], call.v.shape[-1]))),
    })  # fmt: skip


# ---- forward ----


def plan_forward(
    call: AttentionCall, target: Target, out: torch.Tensor, lse: torch.Tensor
) -> list[Launch]:
    """The launches that fill out and lse; nothing in the call is empty."""
    own = {"out_ptr": out, "lse_ptr": lse, "stride_out": rows_stride(out)}
    if is_short(call):
        return [_short_launch(_attention_short_forward_kernel, call, target, **own)]
    B, H, Nq, _ = call.q.shape
    pack = _pack(call)
    config = _configuration(call, target, "forward", pack)
    programs = triton.cdiv(Nq * pack, config.block_m) * (H // pack) * B
    return [Launch(_attention_forward_kernel, programs, {
        **_long_kernels(call, target, pack), **own, "PACK": pack, "LOOP": config.loop,
        **_tiles(config),
    })]  # fmt: skip


# ---- backward ----


def _bias_gradient_form(call: AttentionCall, bias: torch.Tensor) -> str:
    """Which of the schemes of triton_backward.py sums this bias's gradient."""
    if call.bias_width:
        return "shared"
    if bias.shape[3] == 1:
        return "lse"
    if bias.shape[2] == 1:
        return "head" if bias.shape[1] > 1 else "group"
    return "store" if bias.shape[:2] == call.q.shape[:2] else "shared"


def _lse_bias_gradient(
    bias: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None
) -> torch.Tensor:
    """For a bias with one number for all keys: it moves lse alone, sum_j ds_ij = dlse_i."""
    if dlse is None:
        return lse.new_zeros(bias.shape)
    return dlse.masked_fill(lse == float("-inf"), 0.0)[..., None]


def _shared_bias_launch(
    call: AttentionCall, target: Target, bias: torch.Tensor, arguments: dict[str, Any]
) -> tuple[Launch, torch.Tensor]:
    """The launch for a bias (1|B, 1|Hq, Nq, Nk) or (1, Hq, w, slots), and its partial sums."""
    (B, H, Nq, _), (Bb, Hb, rows, columns) = call.q.shape, bias.shape
    config = _configuration(call, target, "dbias", 1)
    programs = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n) * Bb * Hb
    shares = B // Bb * (H // Hb) * (triton.cdiv(Nq, call.bias_width) if call.bias_width else 1)
    slices = min(max(1, _BUSY // programs), shares)
    partial = torch.empty(slices, *bias.shape, dtype=torch.float32, device=bias.device)
    launch = Launch(_attention_backward_dbias_kernel, programs * slices, {
        **arguments, "dbias_ptr": partial, "n_batches": B, "bias_batches": Bb,
        "bias_heads": Hb, "slices": slices, **_tiles(config),
    })  # fmt: skip
    return launch, partial


def plan_backward(
    call: AttentionCall,
    target: Target,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
) -> tuple[list[Launch], torch.Tensor | None]:
    """The launches that fill gradients = (dq, dk, dv), and what sums to the gradient of bias.

    bias is None if its gradient is not wanted; dlse is contiguous; nothing in the call is empty.
    """
    dq, dk, dv = gradients
    dkv = {
        "dk_ptr": dk, "dv_ptr": dv, "stride_dk": rows_stride(dk), "stride_dv": rows_stride(dv)
    }  # fmt: skip
    for_dq = {
        "dq_ptr": dq, "stride_dq": rows_stride(dq), "dlse_ptr": dlse, "DLSE": dlse is not None
    }  # fmt: skip
    do = {"dout_ptr": dout, "stride_dout": rows_stride(dout)}
    if is_short(call):
        kernel = _attention_short_backward_kernel
        return [_short_launch(kernel, call, target, **do, **for_dq, **dkv, scale=call.scale)], None

    (B, H, Nq, _), (Hkv, Nk) = call.q.shape, call.k.shape[1:3]
    form = "none" if bias is None else _bias_gradient_form(call, bias)
    pack = 1 if form in ("head", "shared") else _pack(call)
    config_dq = _configuration(call, target, "dq", pack)
    config_dkv = _configuration(call, target, "dkv", pack)
    tiles = triton.cdiv(Nq * pack, config_dq.block_m)
    n_stats = tiles * config_dq.block_m
    level, delta = lse.new_empty(2, B * (H // pack), n_stats)
    shared = {
        **_long_kernels(call, target, pack), **do,
        "level_ptr": level, "delta_ptr": delta, "n_stats": n_stats,
    }  # fmt: skip
    partial, store, sums = None, None, None
    if form == "store":
        assert bias is not None
        dtype = bias.dtype if bias.dtype != torch.float64 else torch.float32
        partial = store = torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    elif form in ("head", "group"):
        partial = sums = lse.new_empty(B, H if form == "head" else Hkv, 1, Nk)
    elif form == "lse":
        assert bias is not None
        partial = _lse_bias_gradient(bias, lse, dlse)

    launches = [
        Launch(_attention_backward_dq_kernel, tiles * (H // pack) * B, {
            **shared, **for_dq, "out_ptr": out, "lse_ptr": lse, "dbias_ptr": store,
            "stride_out": rows_stride(out),
            "stride_dbias": (0, 0, 0) if store is None else rows_stride(store),
            "scale": call.scale, "PACK": pack, "DBIAS": "none" if store is None else "store",
            "LOOP": config_dq.loop, **_tiles(config_dq),
        }),
        Launch(_attention_backward_dkv_kernel, triton.cdiv(Nk, config_dkv.block_n) * Hkv * B, {
            **shared, **dkv, "dbias_ptr": sums, "scale": call.scale, "PACK": pack,
            "DBIAS": "none" if sums is None else form,
            "LOOP": config_dkv.loop, **_tiles(config_dkv),
        }),
    ]  # fmt: skip
    if form == "shared":
        assert bias is not None
        launch, partial = _shared_bias_launch(call, target, bias, shared)
        launches.append(launch)
    return launches, partial
