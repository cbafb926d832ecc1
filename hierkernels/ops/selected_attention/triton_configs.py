"""Tile sizes, warps and stages of each kernel, where no table has measured ones (configs.py).

Query-major kernels: block_n keys a tile. Key-major: block_n keys by block_m rows.

The table holds what compiles without spills and within the 99 KiB of shared memory that the
smallest devices have (hierkernels.ops.selected_attention.aot checks it).
"""

from __future__ import annotations

from dataclasses import replace

from hierkernels.triton_common.configs import Config, channels_bucket, choose
from hierkernels.triton_common.launch import Target
from hierkernels.triton_common.tiles import power_of_2

# (kernel, channels up to) -> configuration for 16-bit elements; block_m of forward and dq is the
# least, the heads that share a choice may need more rows.
_HALF = {
    ("forward", 64): Config(16, 64, 2, 3),
    ("forward", 128): Config(16, 64, 4, 2),
    ("forward", 256): Config(16, 32, 4, 2),
    ("dq", 64): Config(16, 64, 4, 2),
    ("dq", 128): Config(16, 64, 4, 2),
    ("dq", 256): Config(16, 32, 4, 2),
    ("dkv", 64): Config(64, 64, 4, 2),
    ("dkv", 128): Config(32, 64, 4, 2),
    ("dkv", 256): Config(32, 32, 8, 1),
}
# float32 products run on the ordinary units: smaller tiles.
_SINGLE = {
    ("forward", 64): Config(16, 32, 4, 2),
    ("forward", 128): Config(16, 32, 4, 1),
    ("forward", 256): Config(16, 16, 4, 1),
    ("dq", 64): Config(16, 32, 4, 1),
    ("dq", 128): Config(16, 32, 4, 1),
    ("dq", 256): Config(16, 16, 4, 1),
    ("dkv", 64): Config(32, 32, 8, 1),
    ("dkv", 128): Config(32, 32, 8, 1),
    ("dkv", 256): Config(16, 16, 8, 1),
}
# The interpreter runs one program at a time on a CPU: small tiles, so that small tests have edges.
INTERPRETER = {
    "forward": Config(16, 32, 4, 1),
    "dq": Config(16, 16, 4, 1),
    "dkv": Config(32, 16, 4, 1),
}
KERNELS = {
    "forward": "selected_attention_forward",
    "dq": "selected_attention_backward_dq",
    "dkv": "selected_attention_backward_dkv",
}
# Rows of queries and heads that are worth a program of dkv.
LEAST_ROWS = {"interpreter": 32}
_LEAST_ROWS = 1024


def configuration(
    target: Target, kernel: str, channels: int, element_size: int, block_size: int, heads: int
) -> Config:
    """The configuration of "forward", "dq" or "dkv".

    channels: the larger head dimension; heads: that share a choice of blocks.
    """
    size, heads = power_of_2(block_size), power_of_2(heads)
    if target.family == "interpreter":
        config = INTERPRETER[kernel]
    else:
        bucket = channels_bucket(channels)
        config = (_SINGLE if element_size == 4 else _HALF)[kernel, bucket]
        if kernel != "dkv" and max(config.block_m, heads) >= 64:  # rows that the warps divide
            config = replace(config, block_m=heads, num_warps=8)
        name = f"{8 * element_size}-bit d{bucket} heads{heads} blocks{size}"
        config = choose(target, KERNELS[kernel], name, config)
    if kernel == "dkv":
        block_n = min(config.block_n, max(16, size))
        # 64 rows by 16 keys spill 8 bytes under Triton 3.6, which keeps to 96 registers there.
        block_m = min(config.block_m, 32) if block_n == 16 else config.block_m
        return replace(config, block_m=block_m, block_n=block_n)
    return replace(config, block_m=max(config.block_m, heads))


def least_chunk(target: Target, heads: int) -> int:
    """Queries that are worth a program of dkv, each with this many heads."""
    return -(-LEAST_ROWS.get(target.family, _LEAST_ROWS) // heads)
