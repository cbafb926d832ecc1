"""Tile sizes, warps and stages of each kernel; nothing is tuned during a user's step.

The table holds what compiles without spills and within the 99 KiB of shared memory that the
smallest devices have (hierkernels.ops.selected_attention.aot checks it).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from hierkernels.triton_common.launch import Target


@dataclass(frozen=True)
class Config:
    """Query-major kernels: block_n keys a tile. Key-major: block_n keys by block_m rows."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def compiler_options(self) -> dict[str, int | bool]:
        """What to launch with."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True
        }  # fmt: skip


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
# Rows of queries and heads that are worth a program of dkv.
LEAST_ROWS = {"interpreter": 32}
_LEAST_ROWS = 1024


def configuration(
    target: Target, kernel: str, channels: int, element_size: int, block_size: int, heads: int
) -> Config:
    """The configuration of "forward", "dq" or "dkv".

    channels: the larger head dimension; heads: that share a choice of blocks.
    """
    bucket = 64 if channels <= 64 else 128 if channels <= 128 else 256
    if target.family == "interpreter":
        config = INTERPRETER[kernel]
    else:
        config = (_SINGLE if element_size == 4 else _HALF)[kernel, bucket]
    block_m, block_n, warps = config.block_m, config.block_n, config.num_warps
    if kernel == "dkv":
        block_n = min(block_n, max(16, triton.next_power_of_2(block_size)))
    else:
        block_m = max(block_m, triton.next_power_of_2(heads))
        if block_m >= 64:  # rows are what the warps divide then
            warps = 8
    return Config(block_m, block_n, warps, config.num_stages)


def least_chunk(target: Target, heads: int) -> int:
    """Queries that are worth a program of dkv, each with this many heads."""
    return -(-LEAST_ROWS.get(target.family, _LEAST_ROWS) // heads)
