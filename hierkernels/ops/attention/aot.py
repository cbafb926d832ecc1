"""Compiles the attention kernels for GPUs that are not there and reports what they use.

    python -m hierkernels.ops.attention.aot [--full] [--arch 80 90 100] [--jobs 2] [--json FILE]

See hierkernels/triton_common/aot.py for what is a failure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from hierkernels.key_range import KeyRange
from hierkernels.ops.attention.api import make_call
from hierkernels.ops.attention.call import AttentionCall
from hierkernels.ops.attention.triton_launch import plan_backward, plan_forward
from hierkernels.ops.local_attention import api as local_attention
from hierkernels.triton_common import configs
from hierkernels.triton_common.aot import ARCHITECTURES as ARCHITECTURES
from hierkernels.triton_common.aot import main, new_tensor
from hierkernels.triton_common.launch import Launch, Target
from hierkernels.triton_common.search import Space


@dataclass(frozen=True)
class Case:
    """A call to compile: shapes, dtype and options of hk.attention."""

    name: str
    channels: int
    dtype: str = "bfloat16"
    heads: int = 4
    kv_heads: int = 4
    batch: int = 2
    queries: int = 2048
    keys: int | None = None  # as many as queries if these are 9, or 2048 and more; else 2048
    options: str = ""  # names that _make_call knows, separated by blanks
    quick: bool = False  # part of the set for continuous integration


CASES = (
    Case("causal", 64, quick=True),
    Case("causal", 128, quick=True),
    Case("causal", 256, quick=True),
    Case("bias", 64, options="bias", quick=True),
    Case("packed", 64, kv_heads=1, queries=32, quick=True),
    Case("short", 64, queries=9, options="full", quick=True),
    Case("short", 128, queries=9, options="full"),
    Case("short", 256, queries=9, options="full"),
    Case("short-grouped", 64, kv_heads=1, queries=9, options="full"),
    Case("short-bias", 64, queries=9, options="bias"),
    Case("short-shared-bias", 64, queries=9, options="shared_bias", quick=True),
    Case("short-shared-bias", 128, queries=9, options="shared_bias"),
    Case("short-shared-bias", 256, queries=9, options="shared_bias"),
    Case("short-mask", 128, queries=9, options="mask padding softcap lse"),
    Case("short-dropout", 64, queries=9, options="dropout"),
    Case("short-dropout", 128, queries=9, options="dropout"),
    Case("short-float32", 64, dtype="float32", queries=9),
    Case("grouped", 128, kv_heads=1),
    Case("packed", 128, kv_heads=1, queries=32),
    # Keys in parts; the last of these has as many sequences that they need none.
    Case("decode", 128, kv_heads=1, queries=1, quick=True),
    Case("decode", 64, kv_heads=1, queries=1),
    Case("decode", 256, kv_heads=1, queries=1),
    Case("decode-bias", 128, kv_heads=1, queries=1, options="bias"),
    Case("decode-padding", 128, kv_heads=1, queries=1, options="padding softcap"),
    Case("decode-float32", 128, dtype="float32", kv_heads=1, queries=1),
    Case("speculative", 128, heads=32, kv_heads=4, batch=1, queries=8, keys=8192),
    Case("decode-batch", 128, kv_heads=1, queries=1, batch=512),
    Case("cross", 64, queries=64),
    Case("cross", 128, queries=64),
    Case("cross", 256, queries=64),
    Case("window", 64, options="window"),
    Case("descriptors", 64, options="descriptors"),
    Case("descriptors", 128, options="descriptors"),
    Case("odd", 80),
    Case("bias", 128, options="bias"),
    Case("bias", 256, options="bias"),
    # The dense branches of native sparse attention, with the heads of its paper.
    Case("compressed", 128, heads=64, kv_heads=4, keys=127, options="compressed lse", quick=True),
    Case("window-512", 128, heads=64, kv_heads=4, options="window_512", quick=True),
    Case("compressed-decode", 128, heads=64, kv_heads=4, queries=1, options="compressed"),
    Case("window-decode", 128, heads=64, kv_heads=4, queries=1, options="window_512"),
    Case("shared-bias", 64, options="shared_bias"),
    Case("shared-bias", 128, options="shared_bias"),
    Case("shared-bias", 256, options="shared_bias"),
    Case("slot-bias", 64, options="slot_bias", quick=True),
    Case("slot-bias", 128, options="slot_bias"),
    Case("slot-bias", 256, options="slot_bias"),
    Case("key-bias", 128, options="key_bias"),
    Case("mask", 128, options="mask"),
    Case("padding", 128, options="padding"),
    Case("softcap", 128, options="softcap"),
    Case("dropout", 64, options="dropout"),
    Case("dropout", 128, options="dropout"),
    Case("everything", 128, options="shared_bias mask padding softcap dropout lse"),
    Case("float16", 128, dtype="float16"),
    Case("float32", 64, dtype="float32"),
    Case("float32", 128, dtype="float32"),
    Case("float32", 256, dtype="float32"),
)

# Calls that fill a large device, for `python -m hierkernels.tune`; the first of a bucket stands for
# all.
TUNING = (
    *(Case("causal", d, heads=16, kv_heads=16, queries=8192) for d in (64, 128, 256)),
    *(Case("grouped", d, heads=32, kv_heads=8, queries=4096) for d in (64, 128)),
    *(Case("bias", d, heads=8, kv_heads=8, options="bias") for d in (64, 128)),
    *(Case("shared-bias", d, heads=8, kv_heads=8, options="shared_bias") for d in (64, 128)),
    *(
        Case("slot-bias", d, heads=8, kv_heads=8, queries=8192, options="slot_bias")
        for d in (64, 128)
    ),
    Case("compressed", 128, heads=64, kv_heads=4, queries=8192, keys=511, options="compressed lse"),
    *(Case("decode", d, heads=32, kv_heads=2, batch=64, queries=1, keys=8192) for d in (64, 128)),
    *(Case("short", d, batch=4096, queries=9, options="full") for d in (64, 128, 256)),
    *(Case("short-bias", d, batch=4096, queries=9, options="shared_bias") for d in (64, 128)),
)
_LOOPS = ("always", "branch", "split")
SPACES = {
    "attention_forward": Space(
        (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4), _LOOPS, descriptors=(False, True)
    ),
    "attention_backward_dq": Space((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3), _LOOPS),
    "attention_backward_dkv": Space((16, 32, 64, 128), (64, 128), (4, 8), (1, 2, 3), _LOOPS),
    "attention_backward_dbias": Space((32, 64, 128), (32, 64), (4, 8), (1, 2)),
}


def spill_limit(case: Case) -> float:
    """Bytes of spill stores that a case may have."""
    if case.dtype == "float32":
        return float("inf")  # without tensor cores, arithmetic is what takes the time
    if case.channels > 128 or case.name == "everything":
        return 64  # accumulators take half of the registers; some pointers may wait in memory
    return 0


def _make_call(case: Case, device: str) -> AttentionCall:
    elements: torch.dtype = getattr(torch, case.dtype)

    def new(*shape: int, dtype: torch.dtype = elements) -> torch.Tensor:
        return new_tensor(device, *shape, dtype=dtype)

    B, H, N, D = case.batch, case.heads, case.queries, case.channels
    n_keys = case.keys or (N if N >= 2048 or N == 9 else 2048)
    options: dict[str, dict[str, Any]] = {
        "full": {"is_causal": False},
        "window": {"window_size": (256, 0)},
        "window_512": {"window_size": (511, 0)},
        "compressed": {"is_causal": False, "key_range": KeyRange.compressed(31, 16)},
        "bias": {"attn_bias": new(B, H, N, n_keys)},
        "shared_bias": {"attn_bias": new(H, N, n_keys)},
        "key_bias": {"attn_bias": new(B, 1, 1, n_keys)},
        "mask": {"attn_mask": new(N, n_keys, dtype=torch.bool)},
        "padding": {"key_padding_mask": new(B, n_keys, dtype=torch.bool)},
        "softcap": {"softcap": 30.0},
        "dropout": {"dropout_p": 0.1, "dropout_seed": 1},
        "slot_bias": {"attn_bias": new(H, 128, 256)},  # of local attention
        "lse": {},
        "descriptors": {},
    }
    arguments: dict[str, Any] = {"is_causal": True}
    for name in case.options.split():
        arguments |= options[name]
    q, k, v = new(B, H, N, D), *(new(B, case.kv_heads, n_keys, D) for _ in "kv")
    if "slot_bias" in case.options.split():
        return local_attention.make_call(q, k, v, 128, **arguments).attention
    return make_call(q, k, v, **arguments)


def plan(case: Case, target: Target, device: str = "meta") -> list[Launch]:
    """The launches of a case: forward, then backward with the gradient of a bias."""
    call = _make_call(case, device)
    out, lse = call.new_outputs()
    dlse = lse if "lse" in case.options.split() else None
    launches, _ = plan_backward(call, target, out, lse, out, dlse, call.new_gradients(), call.bias)
    with configs.watching() as seen:
        forward = plan_forward(call, target, out, lse)
    if "descriptors" in case.options.split():
        config = replace(seen["attention_forward"][1], descriptors=True)
        with configs.trying("attention_forward", config):
            forward = plan_forward(call, target, out, lse)
    return forward + launches


if __name__ == "__main__":
    sys.exit(main(["hierkernels.ops.attention.aot"], __doc__))
