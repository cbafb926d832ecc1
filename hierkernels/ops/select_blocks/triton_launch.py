"""Plans the launch of one select_blocks call: which kernel, on which tiles.

A plan only looks at shapes, strides and dtypes: triton.py runs it, aot.py compiles it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hierkernels.key_range import KeyRange
from hierkernels.ops.select_blocks.call import LEAST_PROBABILITY, NO_BLOCK_LOGIT, SelectCall
from hierkernels.ops.select_blocks.triton_kernels import (
    _select_blocks_logit_kernel,
    _select_blocks_probability_kernel,
)
from hierkernels.triton_common.configs import Config, channels_bucket, choose
from hierkernels.triton_common.key_range import range_arguments
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.tiles import LOG2E, cdiv, padded, power_of_2, rows_stride

# (kernel, bytes of an element, channels up to): block_m queries by block_n blocks; what compiles
# without spills, but for logits of more than 128 channels, and within 99 KiB of shared memory
# (hierkernels.ops.select_blocks.aot).
_CONFIGS = {
    ("probability", 2, 64): Config(128, 64, 8, 3),
    ("probability", 2, 128): Config(128, 64, 8, 2),
    ("probability", 2, 256): Config(64, 32, 8, 2),
    ("probability", 4, 64): Config(32, 32, 8, 1),
    ("probability", 4, 128): Config(32, 32, 8, 1),
    ("probability", 4, 256): Config(16, 16, 8, 1),
    ("logit", 2, 64): Config(64, 64, 8, 2),
    ("logit", 2, 128): Config(64, 32, 8, 2),
    ("logit", 2, 256): Config(32, 16, 8, 1),
    ("logit", 4, 64): Config(32, 32, 8, 1),
    ("logit", 4, 128): Config(32, 32, 8, 1),
    ("logit", 4, 256): Config(16, 16, 8, 1),
}
# The interpreter runs one program at a time on a CPU: few tiles, but several in each direction.
_INTERPRETER = Config(32, 16, 4, 1)
# Rows of a tile times places of a list squared: lists live in registers, and longer ones take more
# rounds to merge.
_PLACES = 2**15


def _configuration(call: SelectCall, target: Target, kernel: str, top: int) -> Config:
    Nq, size, bucket = call.q.shape[2], call.q.element_size(), channels_bucket(call.q.shape[-1])
    interpreted = target.family == "interpreter"
    config = _INTERPRETER if interpreted else _CONFIGS[kernel, size, bucket]
    most = max(16, min(power_of_2(Nq), _PLACES // top**2))
    rows = min(config.block_m, most)
    warps = config.num_warps if 2 * rows >= config.block_m else 4
    config = replace(config, block_m=rows, num_warps=warps)
    if not interpreted:
        name = f"{8 * size}-bit d{bucket} rows{min(most, 128)} top{top}"
        config = choose(target, f"select_blocks_{kernel}", name, config)
    return replace(config, block_m=min(config.block_m, most))


def ranges(call: SelectCall) -> dict[str, int] | None:
    """The arguments seen_* (windows) and open_* (candidates); None if beyond 32 bits."""
    found: dict[str, int] = {}
    many = (("seen", call.visible, call.k_cmp.shape[2]), ("open", call.candidates, call.num_blocks))
    for name, key_range, n_keys in many:
        arguments = _upper(key_range, call.q.shape[2], n_keys)
        if arguments is None:
            return None
        found |= {f"{name}_{part}": value for part, value in arguments.items() if part != "STEP"}
        found[f"{name.upper()}_STEP"] = arguments["STEP"]
    return found


def _upper(key_range: KeyRange, n_queries: int, n_keys: int) -> dict[str, int] | None:
    """The upper bound of a range alone: shift, STEP, rise, offset, floor."""
    arguments = range_arguments(key_range, n_queries, n_keys)
    if arguments is None:
        return None
    parts = {part: arguments[f"hi_{part}"] for part in ("shift", "rise", "offset", "floor")}
    return {**parts, "STEP": arguments["HI_STEP"]}


def plan(call: SelectCall, target: Target, indices: torch.Tensor) -> Launch:
    """The launch that fills indices; nothing in the call is empty, there are blocks."""
    B, Hq, Nq, D = call.q.shape
    kernel = "logit" if call.lse is None else "probability"
    top = power_of_2(min(call.num_selected, call.num_blocks))
    config = _configuration(call, target, kernel, top)
    found = ranges(call)
    assert found is not None  # supports() refuses those
    arguments: dict[str, Any] = {
        "q_ptr": call.q, "k_ptr": call.k_cmp, "indices_ptr": indices,
        "stride_q": rows_stride(call.q), "stride_k": rows_stride(call.k_cmp), "n_heads": Hq,
        "n_queries": Nq, "n_windows": call.k_cmp.shape[2], "n_blocks": call.num_blocks,
        "n_selected": call.num_selected, "query_offset": call.query_offset, "D": D,
        "BLOCK_D": padded(D), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_TOP": top, "BLOCK_SIZE": call.block_size, "GROUP": call.group,
        "PACK": Hq // call.heads, "WINDOWS": call.windows_per_block,
        "HOLE": call.own_block_is_a_hole, "num_warps": config.num_warps,
        "num_stages": config.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    programs = B * call.heads * cdiv(Nq, config.block_m)
    if call.lse is None:
        half = call.q.element_size() == 2 and target.family != "interpreter"
        return Launch(_select_blocks_logit_kernel, programs, {
            **arguments, **{name: x for name, x in found.items() if name.lower()[:4] == "open"},
            "score_scale": call.scale, "NO_BLOCK_LOGIT": NO_BLOCK_LOGIT,
            "LEAST_PROBABILITY": LEAST_PROBABILITY,
            "PRECISION": "tf32x3" if half else target.precision,
        })  # fmt: skip
    natural = call.q.dtype == torch.float32
    return Launch(_select_blocks_probability_kernel, programs, {
        **arguments, **found, "lse_ptr": call.lse,
        "score_scale": call.scale * (1.0 if natural else LOG2E.value),
        "first_chunk": call.first_chunk, "num_initial": call.num_initial,
        "num_local": call.num_local, "CHUNKS": call.chunks_per_window,
        "FUSED": not natural and call.scale > 0, "NATURAL": natural, "PRECISION": target.precision,
    })  # fmt: skip
