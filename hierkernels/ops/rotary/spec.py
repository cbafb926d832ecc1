"""The table of rotary's named cases, read by tests: B batch, H heads, N tokens, D channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One problem.

    layout: order of x in memory: "bhnd", "bnhd", "part" of a wider projection, "dbhn" whose last
        stride is not 1.
    scaled: factors in the tables, as xpos has.
    """

    name: str
    B: int
    H: int
    N: int
    D: int
    layout: str = "bhnd"
    scaled: bool = False
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES


CORRECTNESS: tuple[Case, ...] = (
    # Pairs: one, below, at and beyond vectors.
    *(Case(f"d{d}", 2, 3, 5, d) for d in (2, 6, 16, 32, 34, 64, 80)),
    *(Case(f"layout-{name}", 2, 3, 7, 20, layout=name) for name in ("bnhd", "part", "dbhn")),
    Case("scaled", 1, 2, 9, 24, scaled=True),
    Case("many", 60, 4, 9, 64, layout="bnhd", dtypes=(torch.float32, torch.bfloat16)),
    Case("no-tokens", 2, 3, 0, 8),
    Case("no-batch", 0, 3, 4, 8),
)
