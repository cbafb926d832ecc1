"""Tile sizes, warps, stages and loop form for each kernel, device and shape bucket.

The table holds what compiles without spills and within shared memory (hierkernels.ops.attention.aot
checks it); devices that are not in it take the nearest that is no larger. Nothing is tuned during
a user's step.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from hierkernels.triton_common.configs import Config, channels_bucket, choose
from hierkernels.triton_common.device import device_family as device_family
from hierkernels.triton_common.launch import Target
from hierkernels.triton_common.tiles import padded, power_of_2

# (device, kernel, channels up to) -> configuration for 16-bit elements.
# sm_80: an `if` round the mask makes dK/dV spill, so every tile is masked. sm_90, sm_100: "branch"
# keeps the loads pipelined.
_HALF = {
    ("sm_80", "forward", 64): Config(64, 64, 4, 3, "always"),
    ("sm_80", "forward", 128): Config(128, 64, 8, 3, "always"),
    ("sm_80", "forward", 256): Config(64, 64, 8, 2, "always"),
    ("sm_80", "dq", 64): Config(64, 64, 4, 3, "always"),
    ("sm_80", "dq", 128): Config(64, 64, 8, 2, "always"),
    ("sm_80", "dq", 256): Config(64, 64, 8, 1, "always"),
    ("sm_80", "dkv", 64): Config(64, 128, 8, 2, "always"),
    ("sm_80", "dkv", 128): Config(64, 64, 8, 2, "always"),
    ("sm_80", "dkv", 256): Config(32, 64, 8, 2, "split"),
    ("sm_80", "dbias", 64): Config(64, 32, 4, 1, "always"),
    ("sm_80", "dbias", 128): Config(64, 32, 8, 1, "always"),
    ("sm_80", "dbias", 256): Config(32, 32, 8, 2, "always"),
    ("sm_86", "forward", 64): Config(64, 64, 4, 3, "always"),
    ("sm_86", "forward", 128): Config(128, 32, 8, 3, "always"),
    ("sm_86", "forward", 256): Config(64, 32, 8, 2, "always"),
    ("sm_86", "dq", 64): Config(64, 64, 4, 3, "always"),
    ("sm_86", "dq", 128): Config(64, 64, 8, 2, "always"),
    ("sm_86", "dq", 256): Config(64, 32, 8, 1, "always"),
    ("sm_86", "dkv", 64): Config(64, 64, 4, 2, "always"),
    ("sm_86", "dkv", 128): Config(64, 64, 8, 2, "always"),
    ("sm_86", "dkv", 256): Config(32, 32, 8, 1, "always"),
    ("sm_86", "dbias", 64): Config(64, 32, 4, 1, "always"),
    ("sm_86", "dbias", 128): Config(64, 32, 8, 1, "always"),
    ("sm_86", "dbias", 256): Config(16, 32, 8, 2, "always"),
    ("sm_90", "forward", 64): Config(128, 128, 8, 3, "branch"),
    ("sm_90", "forward", 128): Config(128, 128, 8, 2, "branch"),
    ("sm_90", "forward", 256): Config(128, 64, 8, 2, "branch"),
    ("sm_90", "dq", 64): Config(128, 128, 8, 2, "branch"),
    ("sm_90", "dq", 128): Config(128, 128, 8, 2, "branch"),
    ("sm_90", "dq", 256): Config(128, 32, 8, 2, "branch"),
    ("sm_90", "dkv", 64): Config(64, 128, 8, 2, "branch"),
    ("sm_90", "dkv", 128): Config(32, 128, 8, 2, "branch"),
    ("sm_90", "dkv", 256): Config(16, 64, 8, 2, "always"),
    ("sm_90", "dbias", 64): Config(128, 32, 8, 1, "always"),
    ("sm_90", "dbias", 128): Config(128, 32, 8, 1, "always"),
    ("sm_90", "dbias", 256): Config(64, 32, 8, 1, "always"),
    ("sm_100", "forward", 64): Config(128, 128, 8, 3, "branch"),
    ("sm_100", "forward", 128): Config(128, 64, 8, 3, "branch"),
    ("sm_100", "forward", 256): Config(128, 32, 8, 2, "branch"),
    ("sm_100", "dq", 64): Config(128, 64, 8, 3, "branch"),
    ("sm_100", "dq", 128): Config(128, 64, 8, 2, "branch"),
    ("sm_100", "dq", 256): Config(128, 32, 8, 2, "branch"),
    ("sm_100", "dkv", 64): Config(64, 128, 8, 2, "branch"),
    ("sm_100", "dkv", 128): Config(64, 128, 8, 2, "branch"),
    ("sm_100", "dkv", 256): Config(32, 64, 8, 2, "branch"),
    ("sm_100", "dbias", 64): Config(128, 32, 8, 1, "always"),
    ("sm_100", "dbias", 128): Config(128, 32, 8, 1, "always"),
    ("sm_100", "dbias", 256): Config(64, 32, 8, 1, "always"),
}

# What the base table cannot serve without spilling: (device, kernel, channels up to, demand).
# Demands, in the order in which they are looked up: "slots" (a bias by slots, whose addresses take
# registers), "pairs" (a full bias or mask, or dropout, holds one more tile of scores), "modified"
# (a soft cap, key padding, or a bias or mask by keys, holds some more registers), "padded"
# (channels are not a power of two), "packed" (several heads in a tile), "stepped" (bounds whose
# steps are longer than 1), "grouped" (several heads, one after the other).
_SPECIAL = {
    ("sm_80", "forward", 64, "slots"): Config(64, 32, 8, 2, "always"),
    ("sm_86", "forward", 64, "slots"): Config(64, 32, 8, 2, "always"),
    ("sm_80", "forward", 128, "packed"): Config(128, 32, 8, 3, "always"),
    ("sm_80", "dq", 128, "pairs"): Config(64, 32, 8, 2, "split"),
    ("sm_80", "dkv", 64, "pairs"): Config(64, 32, 4, 2, "always"),
    ("sm_80", "dkv", 128, "padded"): Config(64, 64, 8, 1, "always"),
    ("sm_86", "dkv", 128, "padded"): Config(64, 64, 8, 1, "always"),
    ("sm_90", "forward", 128, "pairs"): Config(128, 32, 8, 3, "split"),
    ("sm_90", "dq", 64, "pairs"): Config(128, 32, 8, 3, "split"),
    ("sm_90", "dq", 128, "pairs"): Config(128, 32, 8, 2, "split"),
    ("sm_90", "forward", 128, "modified"): Config(128, 64, 8, 3, "branch"),
    ("sm_90", "dq", 64, "modified"): Config(128, 64, 8, 3, "branch"),
    ("sm_90", "dq", 128, "modified"): Config(128, 64, 8, 2, "branch"),
    ("sm_90", "forward", 128, "padded"): Config(128, 64, 8, 3, "branch"),
    ("sm_90", "dq", 128, "padded"): Config(128, 64, 8, 2, "branch"),
    ("sm_90", "forward", 128, "packed"): Config(128, 64, 8, 3, "branch"),
    ("sm_90", "dq", 128, "packed"): Config(128, 64, 8, 2, "branch"),
    ("sm_90", "forward", 256, "slots"): Config(64, 32, 8, 2, "split"),
    ("sm_90", "dq", 256, "slots"): Config(64, 32, 8, 2, "split"),
    ("sm_90", "dkv", 128, "slots"): Config(32, 64, 8, 2, "split"),
    ("sm_90", "dkv", 128, "stepped"): Config(32, 128, 8, 2, "always"),
    ("sm_90", "dkv", 128, "grouped"): Config(32, 128, 8, 2, "always"),
    ("sm_100", "dkv", 128, "grouped"): Config(64, 128, 8, 1, "branch"),
}
KERNELS = {
    "forward": "attention_forward",
    "dq": "attention_backward_dq",
    "dkv": "attention_backward_dkv",
    "dbias": "attention_backward_dbias",
}
DEMANDS = ("slots", "pairs", "modified", "padded", "packed", "stepped", "grouped")


@functools.lru_cache(maxsize=1024)
def demands_of(
    forms: frozenset[str], dropout: bool, modified: bool, channels: int, pack: int, group: int,
    step: int,
) -> frozenset[str]:  # fmt: skip
    """Which of DEMANDS hold; forms: of the bias and the mask, step: the longest of the bounds.

    modified: by a soft cap or key padding.
    """
    holds = {
        "slots": "slots" in forms,
        "pairs": bool(forms & {"full", "slots"}) or dropout,
        "modified": modified or "keys" in forms,
        "padded": channels != padded(channels),
        "packed": pack > 1,
        "stepped": step > 1,
        "grouped": group > pack,
    }
    return frozenset(name for name in DEMANDS if holds[name])


# float32 products run on the ordinary units: smaller tiles. The second stage of dq keeps what is
# loaded out of registers.
_SINGLE = {
    ("forward", 64): Config(64, 32, 8, 2, "always"),
    ("forward", 128): Config(32, 32, 8, 1, "always"),
    ("forward", 256): Config(32, 16, 8, 1, "always"),
    ("dq", 64): Config(32, 32, 8, 1, "always"),
    ("dq", 128): Config(32, 32, 8, 2, "always"),
    ("dq", 256): Config(16, 16, 8, 2, "always"),
    ("dkv", 64): Config(32, 32, 8, 1, "always"),
    ("dkv", 128): Config(32, 32, 8, 1, "always"),
    ("dkv", 256): Config(16, 16, 8, 1, "always"),
    ("dbias", 64): Config(32, 32, 8, 1, "always"),
    ("dbias", 128): Config(32, 32, 8, 1, "always"),
    ("dbias", 256): Config(16, 16, 8, 1, "always"),
}

# The interpreter runs one program at a time on a CPU: small tiles, so that small tests have edges.
INTERPRETER = {
    "forward": Config(32, 16, 4, 1, "branch"),
    "dq": Config(32, 16, 4, 1, "split"),
    "dkv": Config(16, 32, 4, 1, "branch"),
    "dbias": Config(32, 32, 4, 1, "always"),
}

# Several sequences share a tile if each has at most so many rows and keys: (channels up to, rows).
SHORT_ROWS = ((128, 64), (256, 32))
# (kernel, channels up to) -> a tile of all rows of several sequences; "pairs" as in DEMANDS.
_SHORT = {
    ("forward", 64): Config(64, 64, 4, 1, "always"),
    ("forward", 64, "pairs"): Config(64, 64, 8, 1, "always"),
    ("forward", 128): Config(64, 64, 8, 1, "always"),
    ("forward", 128, "pairs"): Config(64, 32, 8, 1, "always"),
    ("forward", 256): Config(32, 32, 4, 1, "always"),
    ("forward", 256, "pairs"): Config(32, 32, 8, 1, "always"),
    ("dq", 64): Config(64, 32, 8, 1, "always"),
    ("dq", 64, "pairs"): Config(64, 16, 8, 1, "always"),
    ("dq", 128): Config(64, 32, 8, 1, "always"),
    ("dq", 128, "pairs"): Config(64, 16, 8, 1, "always"),
    ("dq", 256): Config(32, 32, 8, 1, "always"),
}


def short_rows(channels: int) -> int:
    """The most rows and keys of sequences that share a tile; 0 if none do."""
    return next((rows for most, rows in SHORT_ROWS if channels <= most), 0)


def short_configuration(
    target: Target, kernel: str, channels: int, element_size: int, pairs: bool
) -> Config:
    """The configuration of "forward", "dq" or "dbias" where a tile holds several sequences.

    Its rows are short_rows(channels), and each of its tiles of keys is masked.
    """
    rows = short_rows(channels)
    if target.family == "interpreter":
        return Config(rows, 32, 4, 1, "always")
    bucket = channels_bucket(channels)
    if kernel == "dbias":
        config = _heuristic(target.family, kernel, channels, element_size, frozenset())
        block_n = config.block_n if bucket <= 128 else 16
        config = replace(config, block_n=block_n, num_warps=8)
    else:
        plain = _SHORT[kernel, bucket]
        config = _SHORT.get((kernel, bucket, "pairs"), plain) if pairs else plain
    name = f"{8 * element_size}-bit d{bucket} short" + (" pairs" if pairs else "")
    config = choose(target, KERNELS[kernel], name, config)
    return replace(config, block_m=rows, loop="always")


def configuration(
    target: Target,
    kernel: str,
    channels: int,
    element_size: int,
    n_rows: int,
    demands: frozenset[str] = frozenset(),
) -> Config:
    """The configuration of "forward", "dq", "dkv" or "dbias".

    channels: the larger head dimension; n_rows: rows of one slot; demands: some of DEMANDS.
    """
    if target.family == "interpreter":
        return INTERPRETER[kernel]
    rows = max(16, min(power_of_2(n_rows), 128))
    bucket, config = _bucket(target.family, kernel, channels, element_size, rows, demands)
    return choose(target, KERNELS[kernel], bucket, config)


@functools.lru_cache(maxsize=1024)
def _bucket(
    family: str, kernel: str, channels: int, element_size: int, rows: int, demands: frozenset[str]
) -> tuple[str, Config]:
    """(name of the bucket of shapes, heuristic); rows: a power of two, at most 128."""
    config = _heuristic(family, kernel, channels, element_size, demands)
    if rows < config.block_m:
        # Rows are what the warps of dkv do not divide: its tile of keys stays as large.
        warps = config.num_warps if kernel == "dkv" else 4
        config = replace(config, block_m=rows, num_warps=warps)
    bucket = f"{8 * element_size}-bit d{channels_bucket(channels)} rows{rows}"
    return " ".join((bucket, *(name for name in DEMANDS if name in demands))), config


def _heuristic(
    family: str, kernel: str, channels: int, element_size: int, demands: frozenset[str]
) -> Config:
    bucket = channels_bucket(channels)
    if element_size == 4:
        return _SINGLE[kernel, bucket]
    keys = [(family, kernel, bucket, name) for name in DEMANDS if name in demands]
    special = next((_SPECIAL[key] for key in keys if key in _SPECIAL), None)
    config = special or _HALF[family, kernel, bucket]
    if special is None and "pairs" in demands and kernel != "dbias":
        config = _with_pairs(config, family)
    return config


def _with_pairs(config: Config, family: str) -> Config:
    """Half the keys a tile, so that the elements of bias, mask or generator fit as well.

    On sm_90 the loads of a bias in a loop with an `if` make ptxas serialise the tensor-core
    instructions; two loops do not.
    """
    loop = "split" if family == "sm_90" and config.loop == "branch" else config.loop
    return replace(config, block_n=max(config.block_n // 2, 32), loop=loop)
