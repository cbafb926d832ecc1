"""Plans the launches of one attention call: which kernels, which tiles, which packing.

A plan only looks at shapes, strides and dtypes. The backend runs it, the ahead-of-time compiler
(aot.py) compiles the very same plan for other devices from tensors without memory.
"""

from __future__ import annotations

from typing import Any

import torch

from hierkernels.key_parts import count_parts
from hierkernels.ops.attention import triton_configs as configs
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.triton_backward import (
    _attention_backward_dkv_kernel,
    _attention_backward_dq_kernel,
)
from hierkernels.ops.attention.triton_bias_gradient import _attention_backward_dbias_kernel
from hierkernels.ops.attention.triton_forward import _attention_forward_kernel
from hierkernels.triton_common.configs import Config
from hierkernels.triton_common.key_range import range_arguments
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.parts import Records
from hierkernels.triton_common.tiles import LOG2E, cdiv, padded, rows_stride

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


def _every_kernel(call: AttentionCall, target: Target, pack: int) -> dict[str, Any]:
    """The arguments that all kernels take."""
    D, Dv, Nq, Nk = call.q.shape[-1], call.v.shape[-1], call.q.shape[2], call.k.shape[2]
    key_range = range_arguments(call.key_range, Nq, Nk)
    assert key_range is not None  # supports() refuses those
    natural = call.q.dtype == torch.float32
    unit = 1.0 if natural else LOG2E.value
    bias, mask = _bias_form(call, pack), _pair_form(call.mask, pack)
    return {
        "q_ptr": call.q, "k_ptr": call.k, "v_ptr": call.v,
        "stride_q": rows_stride(call.q), "stride_k": rows_stride(call.k),
        "stride_v": rows_stride(call.v), "n_queries": Nq, "n_keys": Nk, **key_range,
        "D": D, "DV": Dv, "BLOCK_D": padded(D), "BLOCK_DV": padded(Dv), "GROUP": call.group,
        "PRECISION": target.precision, "n_heads": call.q.shape[1],
        "bias_ptr": call.bias, "mask_ptr": _bytes(call.mask), "padding_ptr": _bytes(call.padding),
        "seed_ptr": call.seed, "stride_bias": _bias_strides(call),
        "stride_mask": _pair_strides(call.mask, call),
        "stride_padding": (0, 0) if call.padding is None else call.padding.stride(),
        "score_scale": call.scale / call.softcap if call.softcap else call.scale * unit,
        "softcap": call.softcap * unit, "NATURAL": natural,
        "dropout_threshold": min(int(call.dropout_p * 2**32), 0xFFFFFFFF),
        "dropout_scale": 1 / (1 - call.dropout_p),
        "BIAS": bias, "MASK": mask, "EVEN": "full" in (bias, mask) and Nk % 16 == 0,
        "PADDING": call.padding is not None, "SOFTCAP": bool(call.softcap),
        "DROPOUT": call.seed is not None,
        # A positive scale alone commutes with the maximum and can wait for the exponent.
        "FUSED": not natural and call.bias is None and not call.softcap and call.scale > 0,
    }  # fmt: skip


def _channels(call: AttentionCall) -> int:
    return max(call.q.shape[-1], call.v.shape[-1])


def _demands(call: AttentionCall, pack: int) -> frozenset[str]:
    """Which of triton_configs.DEMANDS hold."""
    forms = frozenset((_bias_form(call, pack), _pair_form(call.mask, pack)))
    lo, hi = call.key_range
    step = max(lo.step, hi.step)
    modified = call.padding is not None or bool(call.softcap)
    return configs.demands_of(
        forms, call.seed is not None, modified, _channels(call), pack, call.group, step
    )


def _configuration(call: AttentionCall, target: Target, kernel: str, pack: int) -> Config:
    return configs.configuration(
        target,
        kernel,
        channels=_channels(call),
        element_size=call.q.element_size(),
        n_rows=call.q.shape[2] * pack,
        demands=_demands(call, pack),
    )


def _short(call: AttentionCall, target: Target, kernel: str, pack: int) -> Config:
    """The configuration where a tile holds several sequences."""
    pairs, size = "pairs" in _demands(call, pack), call.q.element_size()
    return configs.short_configuration(target, kernel, _channels(call), size, pairs)


def _tiles(config: Config) -> dict[str, Any]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **config.compiler_options()}


def _pack(call: AttentionCall) -> int:
    """Heads that share a tile: the whole group when one head's queries would not fill it."""
    return call.group if call.q.shape[2] < _PACK_BELOW else 1


def is_short(call: AttentionCall) -> bool:
    """Whether tiles hold several sequences, with all heads that share a key/value head."""
    longest = max(call.q.shape[2] * call.group, call.k.shape[2])
    return longest <= configs.short_rows(_channels(call))


def _row_tiles(
    call: AttentionCall, target: Target, kernel: str, pack: int
) -> tuple[int, Config, dict[str, Any]]:
    """(programs, configuration, arguments) of a kernel that owns tiles of rows."""
    (B, H, Nq, _), (Hkv, Nk) = call.q.shape, call.k.shape[1:3]
    items, several = B * Hkv, is_short(call)
    if several:
        config = _short(call, target, kernel, pack)
        of_slot = config.block_m // max(Nq * pack, Nk)
        programs = cdiv(items, of_slot)
    else:
        config, of_slot = _configuration(call, target, kernel, pack), 1
        programs = cdiv(Nq * pack, config.block_m) * (H // pack) * B
    return programs, config, {
        "n_items": items, "items_of_slot": of_slot, "SEVERAL": several, "PACK": pack,
        "LOOP": config.loop, **_tiles(config),
    }  # fmt: skip


# ---- forward ----


def _describable(call: AttentionCall, target: Target) -> bool:
    """Whether tensor descriptors can fetch keys and values: every row starts at 16 bytes."""
    if is_short(call) or target.family not in ("sm_90", "sm_100", "interpreter"):
        return False
    size = call.k.element_size()
    numbers = (*rows_stride(call.k), *rows_stride(call.v))
    starts = (0, 0) if call.k.is_meta else (call.k.data_ptr(), call.v.data_ptr())
    return all(n * size % 16 == 0 for n in numbers) and all(at % 16 == 0 for at in starts)


def _parts(call: AttentionCall, target: Target, programs: int, block_m: int, pack: int) -> int:
    """In how many parts the keys of these programs are cut."""
    if is_short(call):
        return 1
    Nq, Nk = call.q.shape[2], call.k.shape[2]
    lo, hi = call.key_range
    rows = min(Nq * pack, block_m)
    # The last tile sees most keys of all in causal patterns, as many as others in windows.
    first = Nq - cdiv(rows, pack)
    seen = hi.at_query(Nq - 1, Nk) - lo.at_query(first, Nk)
    return count_parts(target.multiprocessors, programs, rows, max(seen, 0))


def plan_forward(
    call: AttentionCall, target: Target, out: torch.Tensor, lse: torch.Tensor
) -> list[Launch]:
    """The launches that fill out and lse; nothing in the call is empty."""
    pack = _pack(call)
    programs, config, rows = _row_tiles(call, target, "forward", pack)
    descriptors = config.descriptors and _describable(call, target)
    parts = _parts(call, target, programs, config.block_m, pack)
    records = Records.new(lse, parts, call.v.shape[3])
    every = _every_kernel(call, target, pack)
    forward = Launch(_attention_forward_kernel, programs * parts, {
        **every, **rows, **records.arguments(), "out_ptr": out, "lse_ptr": lse,
        "stride_out": rows_stride(out), "DESCRIPTORS": descriptors,
    })  # fmt: skip
    scale = every["dropout_scale"]
    return [forward, *records.combine(target, out, lse, every["NATURAL"], scale)]


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
    """The launch for a bias (1|B, 1|Hq, Nq|1, Nk) or (1, Hq, w, slots), and its partial sums."""
    (B, H, Nq, _), (Bb, Hb, rows, columns) = call.q.shape, bias.shape
    several, of_slot = is_short(call) and not call.bias_width, 1
    config = (_short if several else _configuration)(call, target, "dbias", 1)
    if several:
        of_slot = config.block_m // max(Nq, columns)
    programs = cdiv(columns * of_slot, config.block_n) * Bb * Hb
    if not several:
        programs *= cdiv(rows, config.block_m)
    shares = B // Bb * (H // Hb) * (cdiv(Nq, call.bias_width) if call.bias_width else 1)
    slices = min(max(1, _BUSY // programs), cdiv(shares, of_slot))
    partial = torch.empty(slices * of_slot, *bias.shape, dtype=torch.float32, device=bias.device)
    launch = Launch(_attention_backward_dbias_kernel, programs * slices, {
        **arguments, "dbias_ptr": partial, "n_batches": B, "bias_batches": Bb, "bias_heads": Hb,
        "bias_rows": rows, "slices": slices, "SEVERAL": several, "items_of_slot": of_slot,
        "ONE_ROW": rows == 1, **_tiles(config),
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
    (B, H, Nq, _), (Hkv, Nk) = call.q.shape, call.k.shape[1:3]
    short = is_short(call)
    form = "none" if bias is None else _bias_gradient_form(call, bias)
    if short and form in ("head", "group"):  # their rows are not a kernel's own
        form = "shared"
    pack = 1 if form in ("head", "shared") and not short else _pack(call)
    programs, _, rows = _row_tiles(call, target, "dq", pack)
    config = _configuration(call, target, "dkv", pack)
    # Row statistics in packed order, padded to whole tiles of both kernels, or in that of lse.
    slots, n_stats = B * (H // pack), Nq
    if not short:
        block_m = max(rows["BLOCK_M"], config.block_m)
        n_stats = cdiv(Nq * pack, block_m) * block_m
        programs = slots * (n_stats // rows["BLOCK_M"])
    level = delta = None
    if not short or form == "shared":
        level, delta = lse.new_empty(2, B * H if short else slots, n_stats)
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

    every = {
        **_every_kernel(call, target, pack), "dout_ptr": dout, "stride_dout": rows_stride(dout),
        "level_ptr": level, "delta_ptr": delta, "n_stats": n_stats,
    }  # fmt: skip
    both = {
        **every, "dk_ptr": dk, "dv_ptr": dv, "stride_dk": rows_stride(dk),
        "stride_dv": rows_stride(dv), "scale": call.scale,
    }  # fmt: skip
    launches = [Launch(_attention_backward_dq_kernel, programs, {
        **both, **rows, "out_ptr": out, "lse_ptr": lse, "dlse_ptr": dlse, "dq_ptr": dq,
        "dbias_ptr": store, "stride_out": rows_stride(out), "stride_dq": rows_stride(dq),
        "stride_dbias": (0, 0, 0) if store is None else rows_stride(store),
        "DBIAS": "none" if store is None else "store", "DLSE": dlse is not None,
        "STATS": "none" if level is None else "natural" if short else "packed",
    })]  # fmt: skip
    if not short:
        launches.append(Launch(
            _attention_backward_dkv_kernel, cdiv(Nk, config.block_n) * Hkv * B, {
                **both, "dbias_ptr": sums, "PACK": pack,
                "DBIAS": "none" if sums is None else form, "LOOP": config.loop, **_tiles(config),
            }
        ))  # fmt: skip
    if form == "shared":
        assert bias is not None
        launch, partial = _shared_bias_launch(call, target, bias, every)
        launches.append(launch)
    return launches, partial
